"""AdaKV."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvcompress.heads import AdaptiveHeads
from kvcompress.methods import Method, create, register
from kvcompress.pipeline import Stages


@register("adakv", title="AdaKV", paper="arXiv 2407.11550")
@dataclass(frozen=True)
class AdaKV(Method):
    """Head budgets over any inner method: a layer's entries go to the heads that win them in one list of all its scores.

    The `budget` entries a head that a layer has are compared across heads; with b those that the inner selection does not force
    (SnapKV's window), the best ``heads * b`` scores of the layer say how many entries each head wins, and a head keeps
    ``(1 - floor) * won + floor * b`` of its own best, and the forced ones. Heads with spread attention get more. The sum over
    the heads is exact and, where the inner method has layer budgets (PyramidKV, SqueezeAttention), that of the layer. Stored
    ragged: each head's bytes are its own. Once, at the end of a layer's prefill; decoding appends.

    Memory during prefill: one layer's full K and V beside the compressed rest, as its inner method.

    Departures from FFY0/AdaKV@efe4e2e:
        - largest remainders hit the layer's total exactly; ``rounding="official"`` rounds each head by itself, which misses it by up
          to a row a head (their truncated floor, halves to even).
        - storage and budgets per kv head, as their `gqa_support`; their default keeps every query head apart, which is an
          `inner` with ``group_reduce="none"``.
        - `budget` is per sequence of a batch, padding never competes; ties go to the smaller head, then the smaller position.
        - new tokens are written into room behind each head (official: the whole cache is copied every step).
        - their pyramid mode is ``inner="pyramidkv"`` with ``allocation="adakv"``.

    Attributes:
        budget: mean entries a head keeps, forced ones included.
        inner: the method inside, by name or built; its budget is replaced, its layer budgets stay. The paper's is SnapKV.
        floor: weight of the equal share, in [0, 1] (the official floor_alpha).
        normalise: before the competition, scale a head by the share of its mass that its own best b hold.
        skip: first layers, whose heads all get the same.
        rounding: "exact", "official", or "safeguard": kvpress, where each head first keeps its own best ``int(floor * budget)``
            entries and the best of all heads get the rest.
    """

    inner: Method | str = "snapkv"
    floor: float = 0.2
    normalise: bool = False
    skip: int = 0
    rounding: Literal["exact", "official", "safeguard"] = "exact"

    def stages(self) -> Stages:
        inner = create(self.inner, budget=self.budget) if isinstance(self.inner, str) else self.inner
        stages = replace(inner, budget=self.budget).stages()
        if stages.is_ragged:
            raise ValueError(f"{self.name}: inner must be a method that gives all heads the same, got {inner.name}")
        heads = AdaptiveHeads(self.floor, self.normalise, self.rounding, self.skip)
        return replace(stages, heads=heads)
