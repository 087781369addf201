"""How much a key differs from the average key of its head: a score that needs nothing but keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvcompress import score
from kvcompress.layer import LayerState

__all__ = ["KeyDifference", "key_difference"]


def key_difference(keys: Tensor, widen: Callable[[Tensor, int], Tensor] = lambda part, first: part.float()) -> Tensor:
    """``-cos(k_j, mean of the unit keys)`` ``[batch, heads, n]`` float32 of keys ``[batch, heads, n, head_dim]``.

    Args:
        keys: two passes over them, a chunk at a time.
        widen: ``(entries, which is the first of them)`` -> what is compared, float32.
    """
    total = torch.zeros_like(keys[:, :, 0], dtype=torch.float32)
    chunks = [(keys[:, :, first : first + score.CHUNK], first) for first in range(0, keys.shape[2], score.CHUNK)]
    for chunk in chunks:
        total += normalize(widen(*chunk), dim=-1, eps=1e-12).sum(2)
    anchor = normalize(total / keys.shape[2], dim=-1, eps=1e-8)[..., None]
    return -torch.cat([(normalize(widen(*chunk), dim=-1, eps=1e-8) @ anchor)[..., 0] for chunk in chunks], dim=2)


@dataclass(frozen=True)
class KeyDifference:
    """`key_difference` of all keys of a row at once.

    Attributes:
        before_rope: of the keys with their rotation taken back. After RoPE the same key points elsewhere at every position, so
            that the average says little of heads that turn fast; before it, position has no part in the difference.
    """

    before_rope: bool = False
    by_position = False
    queries = 0

    @property
    def while_decoding(self) -> bool:
        return not self.before_rope

    @score.row_by_row
    def __call__(self, layer: LayerState) -> Tensor:
        if not self.before_rope:
            return key_difference(layer.keys)
        return key_difference(layer.keys, lambda part, first: score.before_rope(layer, part, first))

    def __str__(self) -> str:
        return f"keys{' before RoPE' if self.before_rope else ''}, against their mean direction"
