"""Knorm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvcompress import score, select
from kvcompress.budget import Budget, Scores, Uniform, entries
from kvcompress.layer import LayerState
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages
from kvcompress.statistic import Rescored
from kvcompress.when import EveryStep, Prefill


@register("knorm", title="Knorm", paper="arXiv 2406.11430")
@dataclass(frozen=True)
class Knorm(Method):
    """Keeps the keys of the lowest norm: in trained decoders they draw the attention.

    ``score(j) = -|k_j|_2``, a head of the cache on its own. No queries, and RoPE does not change it. Once, at the end of a
    layer's prefill.

    Departures from alessiodevoto/l2compress@f93d6ca:
        - norms and their order in float32 (official: in the cache's dtype, where bfloat16 makes most of them ties).
        - left padding is never kept (official: padded keys compete, and often have small norms).
        - kept entries stay in the order of their positions (official: ascending norm), ties go to the smaller position.
        - by default once after the prefill. ``decode=True`` goes on while decoding, down to the same budget (official, for
          language modelling: a share of what the cache holds at every step).

    Attributes:
        skip_layers: compressed layers (counted from 0) that keep everything; most of the loss comes from the first two.
        prune_after: rows shorter than this keep everything.
        rounding: a share of a prompt in entries: "floor" (kvpress) or "ceil" (official).
        sink, window: first and last entries to keep in any case (official: none).
        decode: goes on evicting while decoding; what keeps its whole prompt stays at that many entries.
        every: while decoding, lets this many entries come together and then evicts them at once.
    """

    skip_layers: tuple[int, ...] = (0, 1)
    prune_after: int = 0
    rounding: Literal["floor", "ceil"] = "floor"
    sink: int = 0
    window: int = 0
    decode: bool = False
    every: int = 1

    def stages(self) -> Stages:
        uniform = not self.skip_layers and self.prune_after == 0 and self.rounding == "floor"
        spared = Spared(self.budget, tuple(self.skip_layers), self.prune_after, self.rounding)
        return Stages(
            score=KeyNorm(),
            budget=Uniform(self.budget) if uniform else spared,
            select=select.TopK(sink=self.sink, window=self.window),
            when=EveryStep(every=self.every) if self.decode else Prefill(),
            decode=Rescored(KeyNorm()) if self.decode else None,
        )


@dataclass(frozen=True)
class KeyNorm:
    """``-|k_j|_2``, in float32."""

    by_position = False
    queries = 0
    while_decoding = True

    @score.row_by_row
    def __call__(self, layer: LayerState) -> Tensor:
        return -score.row_norms(layer.keys)

    def __str__(self) -> str:
        return "norms of the keys"


@dataclass(frozen=True)
class Spared(Budget):
    """`Uniform` with layers and short prompts that keep everything."""

    budget: int | float
    skip_layers: tuple[int, ...]
    prune_after: int
    rounding: Literal["floor", "ceil"]

    def __post_init__(self) -> None:
        entries(self.budget, 1)
        if any(index < 0 for index in self.skip_layers):
            raise ValueError(f"knorm: skip_layers must be layers counted from 0, got {self.skip_layers}")
        if self.prune_after < 0:
            raise ValueError(f"knorm: prune_after must be at least 0, got {self.prune_after}")
        if self.rounding not in ("floor", "ceil"):
            raise ValueError(f'knorm: rounding must be "floor" or "ceil", got {self.rounding!r}')

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        return [n if layer.index in self.skip_layers or n < self.prune_after else self._kept(n) for n in layer.lengths]

    def _kept(self, length: int) -> int:
        if self.rounding == "ceil" and isinstance(self.budget, float):
            return max(1, math.ceil(self.budget * length))  # of the double product: ceil(0.07 * 100) is 8, as official
        return entries(self.budget, length)
