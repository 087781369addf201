"""PyramidKV."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvcompress import budget
from kvcompress.methods import register
from kvcompress.methods.snapkv import SnapKV
from kvcompress.pipeline import Stages


@register("pyramidkv", title="PyramidKV", paper="arXiv 2406.02069")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's choice inside a layer; layer budgets fall in a straight line from the first layer to the last.

    With ``base = budget - window``, layer l keeps ``window + high - l (high - low) / (L - 1)`` entries, ``low = base / beta``,
    ``high = 2 base - low`` or the prompt if that is shorter; so the mean is `budget`. It depends on lengths alone: a
    layer is cut as soon as its own prefill is done.

    Departures from Zefan-Cai/KVCache-Factory@c97f9d7:
        - an exact line, whose layers sum to ``L * budget``. The official integer slope is truncated, which keeps 4 % more
          at 32 layers, 27 % at 80, and prompts shorter than ``2 base`` are uniform; ``allocation="official"`` does so too,
          "kvpress" follows that library.
        - one layer: `budget` (official: a division by zero).
        - what SnapKV does otherwise, see there.

    Attributes:
        budget: mean entries a head keeps in a layer, window included.
        beta: how far the last layer falls below the mean.
        allocation: "exact", "official", "kvpress", or "adakv": AdaKV's copy of the official line, without its uniform case.
    """

    window: int = 8
    beta: int = 20
    allocation: Literal["exact", "official", "kvpress", "adakv"] = "exact"

    def stages(self) -> Stages:
        line = budget.Pyramid(self.budget, self.window, beta=self.beta, allocation=self.allocation)
        return replace(super().stages(), budget=line)
