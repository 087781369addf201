"""SnapKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvcompress import budget, score, select
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages


@register("snapkv", title="SnapKV", paper="arXiv 2404.14469")
@dataclass(frozen=True)
class SnapKV(Method):
    """Keeps what the last `window` prompt queries attend to, smoothed over neighbours, and the window itself.

    ``score(j) = pool_j(group_reduce_h(window_reduce_i(softmax_j(q_i k_j / sqrt(d)))))`` over the prefix; the top
    ``budget - window`` positions a head stay, ascending, plus the window. Compression happens once, at the end of a layer's
    prefill; decoding appends.

    Departures from FasterDecoding/SnapKV@e216ddc:
        - selection and storage per kv head (mean over its query heads): a quarter of the memory at 4 query heads a kv
          head. ``group_reduce="none"`` gives the official storage per query head.
        - left padding is masked out of scores and selection (official: padded columns take softmax mass).
        - probabilities stay float32 (official: rounded to the model's dtype before the vote).
        - equal scores, which max pooling makes in plateaus, go to the smaller position.
        - a share budget below `window` entries is raised to the window.

    Attributes:
        budget: entries a head keeps, window included.
        window: observing queries, always kept.
        kernel_size: odd width of the pooling.
        pool: "max" (the paper's LongBench runs), "avg" (the official class default, zero-padded at the borders) or "none".
        window_reduce: "sum" (official), "mean" (AdaKV, kvpress) or "max".
        group_reduce: "mean" (KVCache-Factory, kvpress), "max", "sum", or "none": official, one selection a query head.
        pool_first: pool before the group is reduced (kvpress).
    """

    window: int = 32
    kernel_size: int = 7
    pool: Literal["avg", "max", "none"] = "max"
    window_reduce: Literal["sum", "mean", "max"] = "sum"
    group_reduce: Literal["mean", "max", "sum", "none"] = "mean"
    pool_first: bool = False

    def stages(self) -> Stages:
        if isinstance(self.budget, int) and self.budget <= self.window:
            raise ValueError(
                f"{self.name}: budget must be more than the window of {self.window} entries, got {self.budget}"
            )
        return Stages(
            score=score.WindowAttention(
                self.window,
                window_reduce=self.window_reduce,
                group_reduce=self.group_reduce,
                pool=self.pool,
                kernel_size=self.kernel_size,
                pool_first=self.pool_first,
            ),
            budget=budget.Uniform(self.budget),
            select=select.TopK(window=self.window),
        )
