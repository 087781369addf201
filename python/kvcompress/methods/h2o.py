"""H2O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kvcompress import budget, score, select
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages
from kvcompress.statistic import Sums
from kvcompress.when import EveryStep


@register("h2o", title="H2O", paper="arXiv 2306.14048")
@dataclass(frozen=True)
class H2O(Method):
    """Keeps the heavy hitters, the entries that all queries so far have attended to most, and the most recent entries.

    ``score(j) = group_reduce_h(sum over all queries i >= j of softmax_j(q_i k_j / sqrt(d)))``, a column sum of the causal
    attention map; of the entries before the recent zone the top ``budget - recent`` stay, and the zone itself. The map
    is computed once more, tile by tile: as many FLOPs as the prefill's QK^T, but no memory beyond the sums. While decoding,
    a token's attention is added before anything leaves, so it sees ``budget + 1`` entries.

    Departures from FMInference/H2O@ac75c2a (utils_real_drop):
        - by default this is the cut at the end of the prefill, and decoding appends. ``decode=True`` is official: the sums go
          on, and one more entry leaves with every token.
        - one set a kv head from its query heads' sums (official: fails on grouped queries); per sequence of a batch
          (official: sums over the batch).
        - float32 sums (official: the model's dtype, where a float16 sum over a long prompt stalls).
        - equal scores go to the smaller position.

    Attributes:
        budget: entries a head keeps, heavy and recent together.
        recent: the most recent entries, always kept: a count (int) or a share of what the row keeps (float in [0, 1]).
        group_reduce: "mean", "max" or "sum" over the query heads of a kv head, or "none": a set a query head.
        decode: goes on evicting while decoding; "mean" or "sum" over the query heads then.
        every: while decoding, lets this many entries come together and then evicts them at once.
        decay: factor of the sums at every decoded token; 1 is H2O.
        per_viewer: divides each sum by the number of queries that see the entry (kvpress' observed attention).
    """

    recent: int | float = 0.5
    group_reduce: Literal["mean", "max", "sum", "none"] = "mean"
    per_viewer: bool = False
    decode: bool = False
    every: int = 1
    decay: float = 1.0

    def stages(self) -> Stages:
        received = score.ReceivedAttention(group_reduce=self.group_reduce, per_viewer=self.per_viewer)
        stages = Stages(
            score=received,
            budget=budget.Uniform(self.budget),
            select=select.TopKRecent(self.recent)
            if isinstance(self.recent, float)
            else select.TopK(window=self.recent),
        )
        if not self.decode:
            return stages
        if self.group_reduce == "none":  # a set a query head: every stored head has one query head
            group: Literal["mean", "sum"] = "mean"
        elif self.group_reduce == "max":
            raise ValueError('h2o: group_reduce must be "mean", "sum" or "none" while decoding, got "max"')
        else:
            group = self.group_reduce
        sums = Sums(replace(received, per_viewer=False), group, self.decay, self.per_viewer)
        return replace(stages, when=EveryStep(every=self.every), decode=sums)
