"""The cases of every op, shared by tests and benchmarks: small and odd for the former, real for the latter."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
