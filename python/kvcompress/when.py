"""When: at which moments the stages run."""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress.budget import entries

__all__ = ["EveryStep", "Prefill", "When"]


@dataclass(frozen=True)
class Prefill:
    """Once: each layer right after its own prefill attention (again after the last one, if the budget needs all layers).

    New tokens are appended and never evicted.
    """


@dataclass(frozen=True)
class EveryStep:
    """At prefill, and again with the forwards after it, so that a layer never outgrows its budget.

    Attributes:
        before_attention: make room before the new tokens are stored, so that attention sees at most `budget` entries, the
            new ones included (sliding window). Otherwise evict after attention, which saw the new tokens on top
            (StreamingLLM, H2O).
        counts_new: of an eviction before attention: the new tokens take part of the budget. Otherwise they come on top of
            it, and attention sees ``budget + 1`` entries (MorphKV).
        every: evict once a row holds this many entries above its budget, all of them at once; 1: whenever it holds one.
        growth: evict once a row, its new token included, holds ``growth * (budget + 1)`` entries; at the prefill likewise.
        keep: the budget of a row grows with it: at least this share of all tokens it has seen.
        lazy: nothing is cut at the prefill, only with the first forward after it.
    """

    before_attention: bool = False
    counts_new: bool = True
    every: int = 1
    growth: float = 1.0
    keep: float | None = None
    lazy: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"EveryStep: every must be at least 1 entry, got {self.every}")
        if self.growth < 1:
            raise ValueError(f"EveryStep: growth must be at least 1, got {self.growth}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"EveryStep: keep must be a share in (0, 1], got {self.keep}")

    def target(self, target: int, seen: int) -> int:
        """The budget of a row that has seen `seen` tokens, if it was `target` at the prefill."""
        return target if self.keep is None else max(target, entries(self.keep, seen))

    def is_due(self, length: int, target: int) -> bool:
        """Whether a row of `length` entries (a token to come on top, or counted in it) falls back to `target`."""
        return length >= target + self.every and length + 1 >= (target + 1) * self.growth

    def keeps_prompt(self, length: int, target: int) -> bool:
        """Whether a prompt of `length` entries waits for a later eviction."""
        return self.lazy or length + 1 < (target + 1) * self.growth


When = Prefill | EveryStep
