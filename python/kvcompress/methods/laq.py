"""LAQ and LAQ++."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvcompress import budget, score, select
from kvcompress.layer import LayerState
from kvcompress.lookahead import Lookahead
from kvcompress.methods import Method, create, register
from kvcompress.pipeline import Stages
from kvcompress.score import GroupReduce, Pool

Mask = Literal["exact", "official"]


@dataclass(frozen=True)
class LookaheadAttention:
    """`window_scores` of the last `window` prompt queries and of the lookahead queries, which lie beyond the prompt.

    Attributes:
        window: prompt queries that observe too, always kept.
        mask: "exact": a query sees the prompt up to its own position, the lookahead queries all of it; "official": all queries
            are taken for the last ones of the prompt.
        pool, kernel_size, group_reduce: see `window_scores`; every query head is pooled first.
    """

    window: int
    mask: Mask = "exact"
    pool: Pool = "max"
    kernel_size: int = 7
    group_reduce: GroupReduce = "mean"
    by_position = False

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"LookaheadAttention: window must be at least 0, got {self.window}")
        if self.mask not in ("exact", "official"):
            raise ValueError(f'LookaheadAttention: mask must be "exact" or "official", got {self.mask!r}')

    @property
    def queries(self) -> int:
        return self.window

    def __call__(self, layer: LayerState) -> Tensor:
        if layer.lookahead is None:
            raise RuntimeError(
                "LookaheadAttention: lookahead queries must be there at the cut: the model looks ahead when it decodes the first "
                "token inside `with kvcompress.models.attach(model):`; the prompt cannot be cut before"
            )
        if len(set(layer.lookahead_lengths)) == 1:
            return self._scores(layer, layer.lookahead[:, :, : layer.lookahead_lengths[0]])
        rows = []  # drafts that ended at different tokens
        for b, count in enumerate(layer.lookahead_lengths):
            one = replace(
                layer,
                queries=None if layer.queries is None else layer.queries[b : b + 1],
                keys=layer.keys[b : b + 1],
                seq_start=None if layer.seq_start is None else layer.seq_start[b : b + 1],
            )
            rows.append(self._scores(one, layer.lookahead[b : b + 1, :, :count]))
        return torch.cat(rows)

    def _scores(self, layer: LayerState, ahead: Tensor) -> Tensor:
        seq_len = layer.seq_len
        window = min(self.window, seq_len)
        query = torch.cat([layer.window(window), ahead], 2) if window else ahead
        beyond = 0 if self.mask == "exact" else ahead.shape[2]
        first = seq_len - window - beyond
        if first < 0:  # the official corner is larger than the prompt: its first queries see nothing
            query, first = query[:, :, -first:], 0
        return score.window_scores(
            query,
            layer.keys,
            seq_start=layer.seq_start,
            first_query=first,
            num_scored=seq_len - window,
            group_reduce=self.group_reduce,
            pool=self.pool,
            kernel_size=self.kernel_size if self.pool != "none" else 1,
            pool_first=True,
            softmax_scale=layer.softmax_scale,
        )

    def __str__(self) -> str:
        prompt = f" and the last {self.window} prompt tokens" if self.window else ""
        return f"attention of a draft's first tokens{prompt}"


@register("laq", title="LAQ", paper="arXiv 2505.20334")
@dataclass(frozen=True)
class LAQ(Method):
    """Keeps what the answer will look at: a few tokens are drafted over a cheap cache, and their queries choose.

    When the first token is decoded, the model goes on greedily for up to `lookahead` tokens over a temporary cache, cut by
    `draft`; only the queries of these tokens are kept. ``score(j) = group_reduce_h(pool_j(sum over prompt and lookahead
    queries i of softmax_j(q_i k_j / sqrt(d))))`` over the whole prompt, whose top ``budget - window`` stay beside its last
    `window` entries. Drafted keys and values are dropped; the answer starts from the prompt's own logits.

    The prompt stays whole until then: the peak is the full cache and the temporary one. Costs up to `lookahead` forward passes.

    Departures from noforit/Lookahead_Q-Cache@74612bd:
        - one set a kv head from its query heads' pooled scores; ``group_reduce="none"`` is official.
        - the lookahead queries see the whole prompt; ``mask="official"`` takes them for its last tokens, so that each
          misses some.
        - sampling drafts from the token that was sampled; batches, each row until its draft ends; padding is masked.
        - probabilities stay float32; equal scores, which max pooling makes in plateaus, go to the smaller position.

    Attributes:
        budget: entries a head keeps.
        window: last prompt tokens that observe too and are kept: 0 is LAQ, 8 is LAQ++.
        lookahead: drafted tokens, the first answer token among them.
        draft: the method of the temporary cache, by name or built; a name gets the same budget.
        mask: "exact" or "official".
        pool, kernel_size: "max", "avg" or "none" over neighbours, odd width.
        group_reduce: "mean", "sum", "max", or "none": a set a query head.
    """

    window: int = 0
    lookahead: int = 8
    draft: Method | str = "snapkv"
    mask: Mask = "exact"
    pool: Pool = "max"
    kernel_size: int = 7
    group_reduce: GroupReduce = "mean"

    def stages(self) -> Stages:
        if isinstance(self.budget, int) and self.budget <= self.window:
            raise ValueError(
                f"{self.name}: budget must be more than the window of {self.window} entries, got {self.budget}"
            )
        draft = create(self.draft, budget=self.budget) if isinstance(self.draft, str) else self.draft
        return Stages(
            score=LookaheadAttention(self.window, self.mask, self.pool, self.kernel_size, self.group_reduce),
            budget=budget.Uniform(self.budget),
            select=select.TopK(window=self.window),
            lookahead=Lookahead(draft.stages(), self.lookahead),
        )


@register("laqpp", title="LAQ++", paper="arXiv 2505.20334")
@dataclass(frozen=True)
class LAQPP(LAQ):
    """LAQ with a window: the last `window` prompt tokens choose too and are kept. See `LAQ`."""

    window: int = 8
