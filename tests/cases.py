"""The cases of every op, shared by tests and benchmarks: small and odd for the former, real for the latter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# --- real shapes


@dataclass(frozen=True)
class Layer:
    """The attention layer that benchmarks measure."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int

    @property
    def q_per_kv(self) -> int:
        return self.num_q_heads // self.num_kv_heads


LAYER = Layer(num_q_heads=32, num_kv_heads=8, head_dim=128, hidden=4096)  # Llama 3.1 8B
PROMPTS = [(1, 8192), (1, 32768), (1, 131072), (8, 8192), (8, 32768), (8, 131072)]  # (batch, seq_len)
WINDOWS = [32, 64]
HEAD_DIMS = [64, 72, 80, 96, 104, 112, 120, 128, 136, 160, 192, 224, 256]  # of sweeps
POOLS = [("avg", 5), ("max", 7)]
TOPK_ROWS = [(8, 8192), (8, 32768), (8, 131072), (8, 262144)]  # (rows, seq_len)
TOPK_ROWS += [(rows, seq_len) for rows in (64, 256) for seq_len in (8192, 32768, 131072, 262144)]


def prompts(device: torch.device, *, quick: bool = False) -> list[tuple[int, int]]:
    """The prompts that a device is measured with: all on a GPU, the smallest on a CPU."""
    return PROMPTS[:1] if quick or device.type == "cpu" else PROMPTS


def budgets(seq_len: int) -> list[int]:
    """Entries kept: a fixed budget and a share."""
    return [1024, seq_len // 4]


def _equal_leading_bits(shape: tuple[int, ...], device: str | torch.device) -> Tensor:
    """Floats of one exponent whose upper 20 bits agree."""
    return (torch.randint(0, 2**12, shape, device=device, dtype=torch.int32) | 0x3F800000).view(torch.float32)


def _empty_rows(shape: tuple[int, ...], device: str | torch.device) -> Tensor:
    scores = torch.randn(shape, device=device)
    scores[..., 1::2, :] = -torch.inf
    return scores


def _pooled_sums(shape: tuple[int, ...], device: str | torch.device) -> Tensor:
    """As `window_scores` gives them: sums of some hundred weights, so all within a tenth of their mean, and smooth."""
    return torch.nn.functional.avg_pool1d(1 + 0.08 * torch.randn(shape, device=device), 5, stride=1, padding=2)


# Scores that a selection must not be slow or wrong on.
SCORES: dict[str, Callable[[tuple[int, ...], str | torch.device], Tensor]] = {
    "random": lambda shape, device: torch.randn(shape, device=device),
    "all equal": lambda shape, device: torch.full(shape, 0.5, device=device),
    "equal leading bits": _equal_leading_bits,
    "presorted": lambda shape, device: torch.randn(shape, device=device).sort(-1).values,
    "-inf rows": _empty_rows,
    "narrow range": lambda shape, device: 1 + 1e-4 * torch.rand(shape, device=device),
    "pooled sums": _pooled_sums,
}


# --- small and odd ones


def left_padding(batch: int, seq_len: int, device: str | torch.device) -> Tensor:
    """seq_start [batch] int32 with row 0 unpadded and the others ever shorter."""
    starts = [(i * seq_len) // (batch + 1) for i in range(batch)]
    return torch.tensor(starts, dtype=torch.int32, device=device)


def strided(t: Tensor) -> Tensor:
    """The same values behind other strides: rows apart, the last dimension contiguous."""
    wide = t.new_empty((*t.shape[:-2], t.shape[-2] * 2, t.shape[-1] + 8))
    view = wide[..., ::2, : t.shape[-1]]
    view.copy_(t)
    return view


def kept_index(
    batch: int, heads: int, seq_len: int, k: int, device: str | torch.device, *, ragged: bool = False
) -> Tensor:
    """A kept index [batch, heads, k] int32 at random: ascending, and if `ragged` ever fewer entries before the -1."""
    index = torch.rand(batch, heads, seq_len).argsort(-1)[..., :k].sort(-1).values.int()
    if ragged:
        counts = torch.randint(0, k + 1, (batch, heads, 1))
        index = torch.where(torch.arange(k) < counts, index, -1)
    return index.int().to(device)


def far_apart(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device, batch_stride: int) -> Tensor:
    """Batch rows `batch_stride` elements apart in one buffer: offsets beyond 32 bits for little memory touched."""
    rest = torch.empty(shape[1:], device="meta")
    poison = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # else all of it is touched
    buffer = torch.empty((shape[0] - 1) * batch_stride + rest.numel(), dtype=dtype, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = poison
    return buffer.as_strided(shape, (batch_stride, *rest.stride()))
