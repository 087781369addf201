"""Moving stored keys to other positions: RoPE depends on differences only, so a stored key can be rotated further."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.cache import Store

__all__ = ["SinkRotation", "rerotate"]


def rerotate(keys: Tensor, shift: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotated keys as they would be at positions moved by `shift`.

    ``R(p + shift) k = R(shift) R(p) k``: the pair (i, i + rotary_dim / 2) turns by the angle ``shift * inv_freq[i]`` (half-split
    layout, as Llama; not interleaved). Computed in float32, rounded once to the dtype of `keys`.

    Args:
        keys: ``[..., n, head_dim]``, already rotated; dimensions beyond ``2 * len(inv_freq)`` are left alone.
        shift: positions to move by, any shape that broadcasts to ``[..., n]``.
        inv_freq: ``[rotary_dim / 2]`` float32, the model's frequencies. Only valid where they do not depend on the position
            (not for dynamic NTK or LongRoPE).

    Returns:
        A new tensor like `keys`.

    Raises:
        ValueError: `inv_freq` longer than half the head dimension.

    Example:
        >>> inv_freq = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
        >>> moved = rerotate(torch.randn(1, 8, 4, 64), torch.tensor(100), inv_freq)
    """
    half = inv_freq.shape[0]
    if 2 * half > keys.shape[-1]:
        raise ValueError(f"rerotate: inv_freq must be [at most {keys.shape[-1] // 2}], got [{half}]")
    angle = shift[..., None].to(torch.float64) * inv_freq.to(torch.float64)
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second = keys[..., :half].float(), keys[..., half : 2 * half].float()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)
    return torch.cat([turned, keys[..., 2 * half :]], dim=-1)


@dataclass(frozen=True)
class SinkRotation:
    """StreamingLLM's positions inside the cache, at the cost of `sink` rotations a step instead of a rotation of all keys.

    Window keys and queries stay at their absolute positions; the sinks are moved up to stand right before the window, so all
    differences, and with them all logits, equal those of a cache numbered from 0. The sinks' first rotation is kept and every
    move starts from it, so nothing drifts.
    """

    sink: int

    def prepare(self, store: Store, inv_freq: Tensor) -> None:
        # sinks sit at 0 .. sink-1, the window ends at the last token seen: the gap between them is what was evicted
        gaps = [seen - length for seen, length in zip(store.seen, store.lengths)]
        if self.sink == 0 or not any(gaps):
            return
        if "sink_keys" not in store.extra:
            store.extra["sink_keys"] = store.keys[:, :, : self.sink].clone()
        shift = torch.tensor(gaps, device=store.keys.device)[:, None, None]
        store.keys[:, :, : self.sink] = rerotate(store.extra["sink_keys"], shift, inv_freq.to(store.keys.device))
