"""TOVA."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompress import budget, score, select
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages
from kvcompress.statistic import Latest
from kvcompress.when import EveryStep


@register("tova", title="TOVA", paper="arXiv 2401.06104")
@dataclass(frozen=True)
class TOVA(Method):
    """Keeps what the last prompt token attends to, averaged over the query heads of the layer: one set for all its heads.

    ``score(j) = mean over query heads h of softmax_j(q_last k_j / sqrt(d))``; the top `budget` entries stay. Nothing is
    protected: no sinks, no window, not even the last token itself.

    Departures from schwartz-lab-NLP/TOVA@9c7d09b:
        - by default this is the cut at the end of the prefill, and decoding appends. ``decode=True`` is official: one more
          entry leaves after every token, by that token's attention.
        - left padding is masked (official: not treated), probabilities stay float32.
        - equal scores go to the smaller position.

    Attributes:
        window: last tokens that are kept whatever their score; 0 is official, 1 is kvpress.
        per_kv_head: a set for each kv head, from the mean over its own query heads.
        decode: goes on evicting while decoding.
        every: while decoding, lets this many entries come together and then evicts them at once.
    """

    window: int = 0
    per_kv_head: bool = False
    decode: bool = False
    every: int = 1

    def stages(self) -> Stages:
        shared = not self.per_kv_head
        stages = Stages(
            score=score.ReceivedAttention(queries=1, shared=shared),
            budget=budget.Uniform(self.budget),
            select=select.TopK(window=self.window),
        )
        if not self.decode:
            return stages
        latest = Latest(score.ReceivedAttention(queries=1), shared=shared)
        return replace(stages, when=EveryStep(every=self.every), decode=latest)
