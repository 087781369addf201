"""Looking ahead: the first tokens of a draft answer say what the answer will look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompress.pipeline import Stages

__all__ = ["Lookahead"]


@dataclass(frozen=True)
class Lookahead:
    """A draft before the cut: the prompt stays whole until the first token is decoded; then the model goes on greedily for some
    tokens over a temporary cache, and only the queries of these tokens are kept, for the score (`LayerState.lookahead`).

    Attributes:
        draft: what the temporary cache is cut by.
        tokens: forward passes of the draft, the first answer token among them; fewer if it ends.
    """

    draft: Stages
    tokens: int = 8

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"Lookahead: tokens must be at least 1, got {self.tokens}")
        if self.draft.lookahead is not None:
            raise ValueError("Lookahead: draft must be a method that does not look ahead itself, got one that does")
        if self.draft.budget.wants_residual:
            raise ValueError(
                "Lookahead: draft must be a method that needs nothing but keys, values and queries, got one that measures the "
                "residual stream"
            )

    @property
    def queries(self) -> int:
        """How many of the last prompt queries the draft's cut looks at."""
        decode = self.draft.decode
        return max(self.draft.score.queries, self.draft.budget.queries, 0 if decode is None else decode.queries)
