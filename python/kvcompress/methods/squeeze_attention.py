"""SqueezeAttention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvcompress import budget
from kvcompress.methods import Method, inner_stages, register
from kvcompress.pipeline import Stages


@register("squeeze_attention", title="SqueezeAttention", paper="arXiv 2404.04793")
@dataclass(frozen=True)
class SqueezeAttention(Method):
    """Layer budgets over any inner method: layers whose attention barely turns the residual stream give theirs to the others.

    Each layer's mean cosine between the stream before and after its attention is measured while the prompt is prefilled;
    exact 1-D k-means makes 3 groups; the group of the highest cosine keeps ``p * budget``, the others share the rest of
    ``layers * budget``. Budgets are per sequence of a batch.

    Memory during prefill: until the last layer is measured, a layer holds the most that any clustering could still give it.
    With a measured layers of no lower cosine and t layers to come, L in all, that is ``b (L - n p) / (L - n)`` entries a head,
    ``n = min(a + t, L - 2)``, and at most the prompt. It comes down with every layer, for those of the highest cosine most; all
    together stay below about ``(p + (1 - p) ln L) L b``. Layers are cut again once they hold an eighth more than their bounds; the
    scores of what they keep, 4 bytes an entry and head, make the last cut exact.

    Departures from hetailang/SqueezeAttention@a1933d1:
        - the exact optimum of the clustering instead of one unseeded start, which misses it in about a fifth of the cases.
        - float32 cosines over real tokens only (official: bfloat16, padding counted, the first row decides for the batch).
        - the share is of the row's own prompt (official Mistral path: of the constant 8000).
        - fewer than 3 distinct cosines or layers: equal budgets (official: an empty cluster).
        - ``allocation="exact"`` also hands out what truncation and short prompts leave over; "official" does not.

    Attributes:
        budget: mean entries a layer.
        inner: the method inside a layer, by name or built; its own budget is replaced.
        p: share of the budget that unimportant layers keep (paper: 0.3 to 0.4).
        allocation: "exact" or "official".
    """

    inner: Method | str = "snapkv"
    p: float = 0.35
    allocation: Literal["exact", "official"] = "exact"

    def stages(self) -> Stages:
        stages = inner_stages(self.name, self.inner, self.budget)
        return replace(stages, budget=budget.Squeeze(self.budget, p=self.p, allocation=self.allocation))
