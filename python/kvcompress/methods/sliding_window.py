"""Sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress import budget, score, select
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages
from kvcompress.when import EveryStep


@register("sliding_window", title="Sliding Window", paper="arXiv 2004.05150, 2310.06825")
@dataclass(frozen=True)
class SlidingWindow(Method):
    """Keeps the last `budget` tokens of each layer, positions untouched: the cheapest policy, and the baseline.

    A decoding query sees exactly `budget` entries, its own included: older ones go before the new token is stored.

    Departures from hetailang/SqueezeAttention@a1933d1 (Mistral path):
        - the prompt is cut at the end of its prefill, not lazily at the first decode step.
        - the prefill itself attends causally to the whole prompt. The official one uses the windows of the previous prompt
          (a leak), and lets a query see ``window + 1`` keys.
    """

    def stages(self) -> Stages:
        return Stages(
            score=score.Recency(),
            budget=budget.Uniform(self.budget),
            select=select.TopK(),
            when=EveryStep(before_attention=True),
        )
