"""PrefixKV."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvcompress import budget, score, select
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages


@register("prefixkv", title="PrefixKV", paper="arXiv 2412.03409")
@dataclass(frozen=True)
class PrefixKV(Method):
    """One share of the attention mass, common to all layers, gives every layer its budget; heads keep the same entries.

    ``score(j) = mean over query heads of sum over all queries i >= j of softmax_j(q_i k_j / sqrt(d))``. In descending order of
    the scores each layer keeps the shortest prefix that holds the share p of their sum, beside the first `sink` and the last
    `window` entries; p is such that the layers together keep ``L * budget``. Online, from the prompt's own scores: budgets
    need all layers, and until the last one a layer is cut to the most it could get. Offline, from a table: each layer is cut
    at once.

    Memory during prefill: with a table, one layer's full K and V beside the compressed rest. Online the bounds of the first
    layers come down as later ones are measured, and layers are cut again once they hold an eighth more than their bounds: at
    most ``9 / 8 * L * budget`` entries a head, with 4 bytes each for its score, beside that.

    Departures from THU-MIG/PrefixKV@39b7265:
        - the threshold is found to the last entry (official: a bisection that stops within 5 entries of the total, is then
          rescaled and truncated, and may never stop on a plateau).
        - per sequence of a batch, padding masked (official: the budget of row 0, rows of one length).
        - `budget` is what is kept (official `ratio`: what is dropped).
        - decoding appends (official: each step drops at most one entry, at a fixed slot 25 before the prompt's end).
        - equal scores go to the smaller position.

    Attributes:
        budget: mean entries a layer.
        sink: first entries, always kept.
        window: last entries, always kept.
        table: path of a JSON file ``{"keep": [share of layer 0, share of layer 1, ...]}`` made for this `budget`, for instance
            the mean over some prompts of what the online form settled on. None: online.
    """

    sink: int = 1
    window: int = 1
    table: str | None = None

    def stages(self) -> Stages:
        keep = select.TopK(sink=self.sink, window=self.window)
        return Stages(
            score=score.ReceivedAttention(shared=True),
            budget=self._offline(self.table) if self.table else budget.PrefixMass(self.budget, keep.forced),
            select=keep,
        )

    def _offline(self, path: str) -> budget.Table:
        try:
            shares = json.loads(Path(path).read_text())["keep"]
            table = budget.Table(tuple(shares))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'prefixkv: table must be a JSON file {{"keep": [share of each layer]}}, got {path} ({error})'
            ) from None
        mean = sum(shares) / len(shares)
        if not isinstance(self.budget, float) or abs(mean - self.budget) > 0.02:  # a table rounds, and prompts differ
            raise ValueError(f"prefixkv: budget must be the mean share of the table ({mean:.3f}), got {self.budget}")
        return table
