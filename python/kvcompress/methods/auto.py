"""Auto: this library's own composition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress import score, select
from kvcompress.difference import KeyDifference
from kvcompress.heads import OneList
from kvcompress.layer import LayerState
from kvcompress.lookahead import Lookahead
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages


@register("auto", title="Auto", paper="none, found by search with kvcompress eval")
@dataclass(frozen=True)
class Auto(Method):
    """Distinct keys, what the last queries look at, and recency; all entries of all layers and heads compete in one list.

    ``score(j) = -cos(k_j, a) + attention * max over h, i of P[h, i, j] + recency * max(0, 1 - age_j / recent)``

    with k_j the key before RoPE and a the mean of its head's unit keys; P the attention of the last `observers` prompt queries i in
    the query heads h of the kv head; age_j the entries behind j. The best ``layers * heads * budget`` entries of the whole model
    stay, first and last ones in any case. One pass, nothing calibrated, no second reading of the prompt.

    Memory during prefill: at most ``9 / 8`` of all entries that stay, as layers are cut again once they hold an eighth more than
    the list so far leaves them; beside them one layer's full K and V, and 8 bytes an entry and kv head of the prompt for the
    scores and the list.

    Why these: one list over all layers and heads is worth more than any score (heads that retrieve keep most of their
    entries, the others next to none). Distinct keys are what later questions look for, and they need no question to be known; RoPE
    blurs the average of heads that turn fast. The attention adds what a visible question asks for. Recency keeps a question
    together without forcing a window on every head. Every term is a share or a cosine, so the weights have no unit. They were
    chosen on questions of 1024 tokens and confirmed on others of 2048 and 4096: ``bench/auto.md``.

    Attributes:
        budget: mean entries a head keeps in a layer.
        attention: weight of the attention; 0 looks at keys alone.
        observers: last prompt queries that pay it.
        recency: what the last entry has above old ones; two keys differ by at most 2.
        recent: after how many entries that has faded, in a straight line.
        sink, window: first and last entries that every head keeps.
        before_rope: looks at keys with their rotation taken back; False for models whose rotation changes with the length.
        lookahead: that many tokens of the answer are drafted over the cache that the method keeps without them, and their queries pay
            attention too (see `LAQ`): better with a visible question, for as many forward passes, and the prompt stays whole
            until they are done; 0: none.
    """

    attention: float = 2.0
    observers: int = 16
    recency: float = 0.5
    recent: int = 128
    sink: int = 4
    window: int = 8
    before_rope: bool = True
    lookahead: int = 0

    def stages(self) -> Stages:
        if self.lookahead < 0 or (self.lookahead and not self.attention):
            raise ValueError(
                f"auto: lookahead must be at least 0, and 0 without attention, got {self.lookahead} with {self.attention}"
            )
        score = Distinct(self.attention, self.observers, self.recency, self.recent, self.before_rope)
        stages = Stages(score, OneList(self.budget), select.TopK(sink=self.sink, window=self.window))
        if not self.lookahead:
            return stages
        return replace(stages, score=replace(score, drafted=True), lookahead=Lookahead(stages, self.lookahead))


@dataclass(frozen=True)
class Distinct:
    """The score of `Auto`."""

    attention: float
    observers: int
    recency: float
    recent: int
    before_rope: bool = True
    drafted: bool = False
    by_position = False

    def __post_init__(self) -> None:
        for name, least in (("attention", 0), ("observers", 1), ("recency", 0), ("recent", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"auto: {name} must be at least {least}, got {getattr(self, name)}")

    @property
    def queries(self) -> int:
        return self.observers if self.attention else 0

    @property
    def wants_lse(self) -> bool:
        return self.attention > 0 and not self.drafted

    @score.row_by_row
    def __call__(self, layer: LayerState) -> Tensor:
        if self.drafted and len(set(layer.lookahead_lengths)) > 1:  # drafts that ended at different tokens
            return torch.cat([self(layer.row(b)) for b in range(layer.keys.shape[0])])
        scores = KeyDifference(self.before_rope)(layer)
        if self.attention and layer.seq_len:
            query, first = layer.window(self.observers), None
            if self.drafted:
                query, first = torch.cat([query, layer.drafted()], 2), layer.seq_len - query.shape[2]
            scores += self.attention * score.window_scores(
                query,
                layer.keys,
                lse=None if self.drafted else layer.window_lse(self.observers),
                first_query=first,
                num_scored=layer.seq_len,
                window_reduce="max",
                group_reduce="max",
                softmax_scale=layer.softmax_scale,
            )
        age = torch.arange(layer.seq_len - 1, -1, -1, device=layer.device)
        return scores + self.recency * (1 - age / self.recent).clamp_min(0)

    def __str__(self) -> str:
        seen = f", attention of the last {self.observers} prompt tokens" if self.attention else ""
        seen += " and of a draft" if self.drafted else ""
        return f"{KeyDifference(self.before_rope)}{seen}, recency"
