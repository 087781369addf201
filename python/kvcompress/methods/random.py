"""Random eviction, the control."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress import budget, score, select
from kvcompress.layer import LayerState
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages


@register("random", title="Random", paper="none, the control")
@dataclass(frozen=True)
class Random(Method):
    """Keeps entries at random: what a score must beat to be worth anything.

    The draw of an entry depends on the seed, its layer, its head and its position, and on nothing else: the same on every
    device, in every batch and beside any padding.

    Attributes:
        seed: other seeds, other entries.
        sink, window: first and last entries to keep in any case.
    """

    seed: int = 0
    sink: int = 0
    window: int = 0

    def stages(self) -> Stages:
        return Stages(
            score=RandomScore(self.seed),
            budget=budget.Uniform(self.budget),
            select=select.TopK(sink=self.sink, window=self.window),
        )


@dataclass(frozen=True)
class RandomScore:
    """Uniform in [0, 1), one stream of numbers a layer."""

    seed: int
    by_position = False
    is_mass = True
    queries = 0

    @score.row_by_row
    def __call__(self, layer: LayerState) -> Tensor:
        batch, heads = layer.keys.shape[:2]
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * layer.index)
        drawn = torch.rand(layer.seq_len, heads, generator=generator)  # by position first: a longer prompt draws on
        return drawn.mT.contiguous().to(layer.device).expand(batch, heads, -1)

    def __str__(self) -> str:
        return "nothing: at random"
