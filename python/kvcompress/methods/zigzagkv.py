"""ZigZagKV."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompress import budget
from kvcompress.methods import Method, inner_stages, register
from kvcompress.pipeline import Stages


@register("zigzagkv", title="ZigZagKV", paper="arXiv 2412.09036")
@dataclass(frozen=True)
class ZigZagKV(Method):
    """Layer budgets over any inner method: a layer gets room in proportion to the entries that hold most of its attention.

    Each layer counts, head by head, how many entries hold `tau` of the attention of the last `window` queries; with u the
    mean count, layer l keeps ``beta b + (1 - beta) b L u_l / sum(u)`` entries. Budgets are per sequence of a batch and sum to
    ``L b``. They need all layers: until the last one is measured, a layer is cut to the most that it could get.

    Memory during prefill: the bounds of the first layers come down as later ones are measured, and layers are cut again once they
    hold an eighth more than their bounds. So at most ``9 / 8 * L b`` entries a head are held, with 4 bytes each for its score,
    and beside them one layer's full K and V.

    No official code is known; NVIDIA/kvpress PR 238 (not merged) is the reference. Departures from it:
        - counts on the attention before any pooling, all entries included (its last revision: pooled and grouped scores).
        - counts per row of a batch (there: averaged over rows); padding is masked.
        - budgets sum to the total: what a clamped layer leaves goes to the others (there: it is lost).

    Attributes:
        budget: mean entries a layer.
        inner: the method inside a layer, by name or built; its own budget is replaced. The paper's is SnapKV.
        window: observing queries of the counts.
        tau: share of the attention to be held.
        beta: share of the budget that every layer keeps in any case.
    """

    inner: Method | str = "snapkv"
    window: int = 32
    tau: float = 0.9
    beta: float = 0.2

    def stages(self) -> Stages:
        stages = inner_stages(self.name, self.inner, self.budget)
        return replace(stages, budget=budget.ZigZag(self.budget, window=self.window, tau=self.tau, beta=self.beta))
