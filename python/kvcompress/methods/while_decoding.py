"""Any score, asked again while decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompress.methods import Method, inner_stages, register
from kvcompress.pipeline import Stages
from kvcompress.statistic import Rescored
from kvcompress.when import EveryStep, Prefill


@register("while_decoding", title="While decoding", paper="of its method")
@dataclass(frozen=True)
class WhileDecoding(Method):
    """Cuts again while decoding, by another method's score over what is stored and the last queries seen.

    Whenever `every` entries have come together above the budget, the score is computed anew over the stored entries, and
    they fall back to the budget (kvpress' DecodingPress does so with its presses). With `keep`, the budget grows: a row never
    falls below that share of all tokens it has seen.

    Attributes:
        inner: a method that cuts once, whose score needs neither the entries' positions nor all queries, by name or built; its
            own budget is replaced.
        every: entries above the budget that are evicted at once.
        keep: the share of all tokens that a row may keep, whatever the budget; None: the budget does not grow.
    """

    inner: Method | str = "snapkv"
    every: int = 64
    keep: float | None = None

    def stages(self) -> Stages:
        stages = inner_stages(self.name, self.inner, self.budget)
        if not isinstance(stages.when, Prefill):
            raise ValueError(f"{self.name}: inner must be a method that cuts once, got {self.inner}")
        if stages.reuse > 1:
            raise ValueError(f"{self.name}: inner must score every layer itself, got {self.inner}")
        return replace(stages, when=EveryStep(every=self.every, keep=self.keep), decode=Rescored(stages.score))
