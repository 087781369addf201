"""KeyDiff."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress import budget, score, select
from kvcompress.difference import KeyDifference, key_difference
from kvcompress.layer import LayerState
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages
from kvcompress.statistic import Rescored
from kvcompress.when import EveryStep, Prefill


@register("keydiff", title="KeyDiff", paper="arXiv 2504.15364")
@dataclass(frozen=True)
class KeyDiff(Method):
    """Keeps the keys that look least like the average key; attention is high where a key differs from it.

    ``score(j) = -cos(k_j, a)`` with the anchor ``a = mean_j k_j / |k_j|``, a head of the cache on its own; keys as cached,
    after RoPE. One shot at the end of a layer's prefill, or in the paper's block form, which never looks at more than
    ``budget + block_size`` keys: the first `budget` entries start as kept, and each block of the prompt then competes with
    what is kept, anchor and scores taken anew over these candidates only.

    No official code is known. Departures from NVIDIA/kvpress@8bb29b9 (KeyDiffPress, BlockPress):
        - float32 whatever the cache's dtype, where many scores are nearly equal.
        - left padding counts neither in the anchor nor as a candidate; in block form each row's blocks start behind its own
          first `budget` entries.
        - ties go to the smaller position.
        - ``decode=True`` goes on in blocks while decoding (kvpress: through its DecodingPress): `every` new entries compete with
          what is kept, anchor and scores taken anew over them.

    Attributes:
        block_size: entries a block (paper: 128); None: one shot.
        sink, window: first and last entries to keep in any case (paper: none); inside a block run they compete.
        before_rope: looks at the keys with their rotation taken back, in which their position has no part. Not in the paper.
        decode: goes on evicting while decoding.
        every: while decoding, lets this many entries come together and then evicts them at once.
    """

    block_size: int | None = None
    sink: int = 0
    window: int = 0
    before_rope: bool = False
    decode: bool = False
    every: int = 128

    def stages(self) -> Stages:
        blocks = None if self.block_size is None else KeyDifferenceInBlocks(self.budget, self.block_size)
        if self.before_rope and (blocks or self.decode):
            raise ValueError("keydiff: before_rope must be False in blocks and while decoding, got True")
        return Stages(
            score=blocks or KeyDifference(self.before_rope),
            budget=budget.Uniform(self.budget),
            select=select.TopK(sink=self.sink, window=self.window),
            when=EveryStep(every=self.every) if self.decode else Prefill(),
            decode=Rescored(KeyDifference()) if self.decode else None,
        )


@dataclass(frozen=True)
class KeyDifferenceInBlocks:
    """`key_difference` among at most ``budget + block_size`` candidates, block after block.

    An entry's score is that of the last round it took part in, and every later round counts more than any score: so the
    top `budget` are what the last round keeps, and a larger cut takes back what was evicted last.
    """

    budget: int | float
    block_size: int
    by_position = False
    queries = 0

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"keydiff: block_size must be at least 1, got {self.block_size}")

    @score.row_by_row
    def __call__(self, layer: LayerState) -> Tensor:
        batch, heads, length, dim = layer.keys.shape
        kept = min(length, budget.entries(self.budget, length))
        starts = range(kept, length, self.block_size)
        if not starts:
            return key_difference(layer.keys)
        scores = torch.empty(batch, heads, length, dtype=torch.float32, device=layer.device)
        position = torch.arange(length, device=layer.device).expand(batch, heads, -1)
        held = position[:, :, :kept]
        for rounds_left, start in zip(reversed(range(len(starts))), starts):
            candidates = torch.cat([held, position[:, :, start : start + self.block_size]], dim=2)
            difference = key_difference(layer.keys.gather(2, candidates[..., None].expand(-1, -1, -1, dim)))
            scores.scatter_(2, candidates, difference - 3 * rounds_left)  # scores lie in [-1, 1]
            held = candidates.gather(2, select.topk(difference, kept).long())
        return scores

    def __str__(self) -> str:
        return f"keys, against their mean direction, in blocks of {self.block_size}"
