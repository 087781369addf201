"""When: at which moments the stages run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EveryStep", "Prefill", "When"]


@dataclass(frozen=True)
class Prefill:
    """Once: each layer right after its own prefill attention (again after the last one, if the budget needs all layers).

    New tokens are appended and never evicted.
    """


@dataclass(frozen=True)
class EveryStep:
    """At prefill, and again with every forward after it, so that a layer never outgrows its budget.

    Attributes:
        before_attention: make room before the new tokens are stored, so that attention sees at most `budget` entries, the
            new ones included (sliding window). Otherwise evict after attention, which saw the new tokens on top
            (StreamingLLM).
    """

    before_attention: bool = False


When = Prefill | EveryStep
