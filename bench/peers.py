"""Other libraries' way to do what our ops do. Each function gives a callable, or the reason why there is none here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Words in the names of libraries that are not even imported, which takes seconds.
left_out: list[str] = []


def _module(name: str) -> Any:
    """The module, or why it cannot be imported."""
    if any(words in name for words in left_out):
        return "left out"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"cannot be imported: {error}"
    except Exception as error:  # a foreign package may fail in any way when it is loaded
        return f"cannot be imported: {type(error).__name__}: {error}"


def torch_window_scores(q: torch.Tensor, k: torch.Tensor, pool: str, kernel: int) -> torch.Tensor:
    """window_scores in eager torch without repeating K: materialises [B, Hkv, G * W, S]."""
    batch, heads, window, dim = q.shape
    length = k.shape[2]
    group = heads // k.shape[1]
    logits = q.reshape(batch, k.shape[1], group * window, dim) @ k.transpose(2, 3) * dim**-0.5
    rows = torch.arange(window, device=q.device).repeat(group)
    hidden = torch.arange(length, device=q.device) > length - window + rows[:, None]
    votes = logits.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    votes = votes.view(batch, k.shape[1], group, window, length).sum(3).mean(2)[..., : length - window]
    if pool == "avg":
        return F.avg_pool1d(votes, kernel, 1, kernel // 2)
    return F.max_pool1d(votes, kernel, 1, kernel // 2)


def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function through torch.compile, one graph a shape; the compiler is imported by the first call, in seconds."""
    made = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *inputs: made()(*inputs)


def compiled_window_scores() -> Callable[..., torch.Tensor]:
    """torch_window_scores through torch.compile."""
    return _compiled(torch_window_scores)


def sdpa_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of a whole prompt by torch's flash kernel, and by nothing else."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with its log-sum-exp, for inputs."""
    if q.is_cuda:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    else:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return output.contiguous(), lse.float().contiguous()


def torch_column_sums(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """column_sums over all queries in plain torch: materialises the map."""
    group, length = q.shape[1] // k.shape[1], k.shape[2]
    logits = q.unflatten(1, (k.shape[1], group)) @ k[:, :, None].mT * q.shape[-1] ** -0.5
    position = torch.arange(length, device=q.device)
    logits = logits.masked_fill(position > position[:, None], -torch.inf)
    return logits.softmax(-1, dtype=torch.float32).sum((2, 3)) / group


def compiled_column_sums() -> Callable[..., torch.Tensor]:
    """torch_column_sums through torch.compile, on inputs of which the first two count."""
    compiled = _compiled(torch_column_sums)
    return lambda x: compiled(x[0], x[1])


def _submodule(package: str, name: str) -> Any:
    """A submodule of a package whose own __init__ cannot run here, or why it cannot be imported either.

    Libraries import all they have at once, with every optional need; one file of them needs little. The package is
    entered by name and folder alone.
    """
    if isinstance(whole := _module(package), str):
        spec = importlib.util.find_spec(package)
        if spec is None:
            return whole
        for name_of_part in [part for part in sys.modules if part == package or part.startswith(package + ".")]:
            del sys.modules[name_of_part]
        bare = types.ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[package] = bare
    return _module(f"{package}.{name}")


def torch_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: int, kept: int) -> list[torch.Tensor]:
    """One layer's compression in eager torch: window_scores, the best of them and the window, and their rows."""
    scores = F.pad(torch_window_scores(q, k, "avg", kernel), (0, q.shape[2]), value=torch.inf)
    index = scores.topk(kept, dim=-1, sorted=False).indices.sort(-1).values
    return [t.gather(2, index[..., None].expand(-1, -1, -1, t.shape[-1])) for t in (k, v)]


def kvpress_snapkv() -> tuple[Callable[..., torch.Tensor], Callable[..., object]] | str:
    """SnapKV's scores and whole compression by kvpress, as its press computes them: with the projection and RoPE of the
    window's queries, and the one host sync of its padding value. `q` gives the sizes only.
    """
    module = _submodule("kvpress", "presses.snapkv_press")
    if isinstance(module, str):
        return module
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    @functools.cache
    def attention(heads: int, kv_heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> LlamaAttention:
        config = LlamaConfig(
            hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim
        )
        return LlamaAttention(config, 0).to(device, dtype)

    def press_of(q: torch.Tensor, kernel: int, share: float) -> Any:
        return module.SnapKVPress(compression_ratio=1 - share, window_size=q.shape[2], kernel_size=kernel)

    def arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
        batch, heads, window, dim = q.shape
        layer = attention(heads, k.shape[1], dim, k.device, k.dtype)
        hidden = q.new_ones(batch, 1, heads * dim).expand(batch, window + 1, -1)
        angles = q.new_ones(batch, window + 1, dim)
        return layer, hidden, k, v, None, {"position_embeddings": (angles, angles)}

    @torch.no_grad()
    def scores(q: torch.Tensor, k: torch.Tensor, kernel: int) -> torch.Tensor:
        return press_of(q, kernel, 0.5).score(*arguments(q, k, k))

    @torch.no_grad()
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: int, kept: int) -> object:
        share = (kept + 0.5) / k.shape[2]  # it rounds down
        return press_of(q, kernel, share).compress(*arguments(q, k, v))

    return scores, step


def kvpress_decoding() -> Callable[[int, int], Any] | str:
    """DecodingPress of kvpress over the norms of the keys, for a number of entries and of tokens between two evictions."""
    decoding = _submodule("kvpress", "presses.decoding_press")
    norms = _submodule("kvpress", "presses.knorm_press")
    for module in (decoding, norms):
        if isinstance(module, str):
            return module

    def press(entries: int, every: int) -> Any:
        return decoding.DecodingPress(
            base_press=norms.KnormPress(), compression_interval=every, target_size=entries, hidden_states_buffer_size=0
        )

    return press


def flashinfer_topk() -> Callable[[torch.Tensor, int], object] | str:
    """flashinfer.top_k with ties to the smaller index; it does not order its output."""
    module = _submodule("flashinfer", "topk")
    if isinstance(module, str):
        return module
    small = module.TopKTieBreak.SMALL
    return lambda scores, k: module.top_k(scores.flatten(0, 1), k, tie_break=small)
