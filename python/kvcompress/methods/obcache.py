"""OBCache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvcompress import budget, score, select
from kvcompress.cache import DenseStore
from kvcompress.columns import Statistic, column_sums
from kvcompress.decode import decode_attention
from kvcompress.layer import ALL_QUERIES, LayerState
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages
from kvcompress.ragged import RaggedStore
from kvcompress.statistic import Observed, Scores, attend_and_observe, by_kv_head, kept_of
from kvcompress.terms import Term, output_terms_
from kvcompress.when import EveryStep

if TYPE_CHECKING:
    from kvcompress.fixed import FixedStore

Kind = Literal["value", "key", "joint"]


@dataclass(frozen=True)
class OutputPerturbation:
    """How much the attention output changes, to first order, when an entry's value, key or both are set to zero.

    With A the causal attention of the observing queries, s the logits, O the output, all per query head:

    - value: ``sum over q of A^2 * |v_j|^2``;
    - key: ``sum over q of (A s)^2 * |v_j - O_q|^2``;
    - joint: both, and the cross term ``sum over q of 2 A^2 s <v_j, v_j - O_q>``.

    The query heads of a kv head are summed, as the change of the output is. The sums over the queries are `column_sums`, in
    float32: one pass over K and V for the joint form with its defaults, one a term for the others. O is what the layer's own
    attention gave the queries; where the model loop does not have it any more, it is made again (`score.attention_output`).
    Nothing of the size of the map is held.

    Attributes:
        kind: "value", "key" or "joint".
        queries: how many of the last prompt tokens observe.
        recent: last entries, which are not pooled.
        p: power of A and norm of v in the value's term, 1 or 2.
        value_norm: whether the value's term has the norm of v; without it and with p = 1 it is plain attention.
        cross: whether the joint score has its cross term.
        pool: "avg" (zeros lie outside the pooled entries), "max" or "none".
        kernel_size: odd width of the pool.
        group_reduce: "sum" over the query heads of a kv head, or "none": one row a query head.
    """

    kind: Kind = "joint"
    queries: int = 32
    recent: int = 32
    p: Literal[1, 2] = 2
    value_norm: bool = True
    cross: bool = True
    pool: Literal["none", "avg", "max"] = "none"
    kernel_size: int = 7
    group_reduce: Literal["sum", "none"] = "sum"
    by_position = False
    wants_lse = True

    def __post_init__(self) -> None:
        known = {
            "kind": ("value", "key", "joint"),
            "p": (1, 2),
            "pool": ("none", "avg", "max"),
            "group_reduce": ("sum", "none"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"OutputPerturbation: {name} must be one of {values}, got {getattr(self, name)!r}")
        if self.queries < 1:
            raise ValueError(f"OutputPerturbation: queries must be at least 1, got {self.queries}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"OutputPerturbation: kernel_size must be odd and positive, got {self.kernel_size}")

    @property
    def wants_output(self) -> bool:
        return self.kind != "value"

    @property
    def is_mass(self) -> bool:
        return self.p == 2  # norms, not signed sums

    def __call__(self, layer: LayerState) -> Tensor:
        scores = self._change(layer)
        padding = self._padding(layer)
        if self.pool != "none":
            cut = torch.arange(layer.seq_len, device=layer.device) < layer.seq_len - self.recent
            pooled = cut if padding is None else cut & ~padding
            scores = self.pooled(scores, pooled.expand_as(scores))
        return scores if padding is None else scores.masked_fill(padding, -torch.inf)

    def _change(self, layer: LayerState) -> Tensor:
        """The score before its pool, ``[batch, heads, seq_len]``; anything in the padding."""
        queries = layer.window(self.queries)
        lse, output = layer.window_lse(self.queries), None
        if self.wants_output:
            output = layer.window_output(self.queries)
            if output is None:
                output, lse = score.attention_output(layer, queries)

        def columns(statistic: Statistic) -> Tensor:
            return column_sums(
                queries,
                layer.keys,
                statistic=statistic,
                group_reduce=self.group_reduce,
                lse=lse,
                seq_start=layer.seq_start,
                v=layer.values if statistic.endswith("_change") else None,
                output=output if statistic.endswith("_change") else None,
                softmax_scale=layer.softmax_scale,
            )

        def value() -> Tensor:
            attention = columns("sum" if self.p == 1 else "sum_squares")
            if not self.value_norm:
                return attention
            size = score.by_chunks(lambda part: part.abs().pow(self.p).sum(-1), layer.values)
            return attention * size.repeat_interleave(attention.shape[1] // size.shape[1], 1)

        if self.kind == "value":
            return value()
        if self.kind == "key":
            return columns("key_change")
        if self.p == 2 and self.value_norm and self.cross:
            return columns("joint_change")
        apart = value() + columns("key_change")
        return apart + columns("cross_change") if self.cross else apart

    def _padding(self, layer: LayerState) -> Tensor | None:
        if layer.seq_start is None:
            return None
        return (torch.arange(layer.seq_len, device=layer.device) < layer.seq_start[:, None])[:, None]

    def pooled(self, scores: Tensor, inside: Tensor) -> Tensor:
        """Scores ``[..., n]``, those `inside` (bool) pooled with their neighbours that are inside, too."""
        outside = 0.0 if self.pool == "avg" else -torch.inf
        pool = avg_pool1d if self.pool == "avg" else max_pool1d
        prefix = scores.masked_fill(~inside, outside)
        return torch.where(inside, pool(prefix, self.kernel_size, stride=1, padding=self.kernel_size // 2), scores)

    def of_step(self, logits: Tensor, weights: Tensor, out: Tensor, values: Tensor) -> Tensor:
        """What the queries of one attention add: ``[batch, heads, per_kv, n, entries]`` float32.

        Args:
            logits, weights: ``[batch, heads, per_kv, n, entries]`` float32; where a weight is 0 the logit does not count.
            out: ``[batch, heads, per_kv, n, head_dim]`` float32, their attention's output.
            values: ``[batch, heads, entries, head_dim]`` float32.
        """
        logits = logits.masked_fill(weights == 0, 0)
        added = torch.zeros_like(weights)
        if self.kind != "key":
            size = values.abs().pow(self.p).sum(-1) if self.value_norm else torch.ones_like(values[..., 0])
            added += weights.pow(self.p) * size[:, :, None, None]
        if self.kind != "value":
            value_square = values.square().sum(-1)[:, :, None, None]
            along = out @ values[:, :, None].mT
            added += (weights * logits).square() * (value_square + out.square().sum(-1, keepdim=True) - 2 * along)
            if self.kind == "joint" and self.cross:
                added += 2 * weights.square() * logits * (value_square - along)
        return added

    def __str__(self) -> str:
        who = "all prompt tokens" if self.queries == ALL_QUERIES else f"the last {self.queries} prompt tokens"
        return f"change of the output of {who} without the entry's {'key and value' if self.kind == 'joint' else self.kind}"


@dataclass(frozen=True)
class PerturbationSums:
    """`OutputPerturbation` of every query so far, the decoded ones added to the prompt's as they come.

    Sums are not pooled; the rank is. Official keeps the sum of attention and the norm of v apart; v of an entry does not change,
    so one sum says the same.

    Attributes:
        score: the prompt's score.
        latest_only: the newest query alone (TOVA's form).
    """

    score: OutputPerturbation
    latest_only: bool = False

    @property
    def queries(self) -> int:
        return self.score.queries

    def start(self, layer: LayerState, store: DenseStore | RaggedStore, scores: Scores) -> None:
        store.put_beside("change", kept_of(scores(replace(self.score, pool="none")), layer, store, 0.0), fill=0.0)

    def attend(
        self, store: DenseStore, query: Tensor, *, softmax_scale: float, real: Sequence[int] | None = None
    ) -> Tensor:
        values = store.view()[1].float()

        def observe(seen: Observed) -> None:
            weights, logits, out = (by_kv_head(t, store) for t in (seen.probabilities(), seen.logits, seen.out.float()))
            added = self.score.of_step(logits, weights, out, values)
            change = store.beside["change"][:, :, : store.max_length]
            if not self.latest_only:
                change += added.sum((2, 3))
            elif seen.last:
                change.copy_(torch.where(seen.is_token[:, :, -1], added[:, :, :, -1].sum(2), change))

        return attend_and_observe(store, query, observe, softmax_scale=softmax_scale, real=real)

    def rank(self, store: DenseStore) -> Tensor:
        change = store.beside["change"][:, :, : store.max_length]
        if self.score.pool == "none":
            return change
        slot = torch.arange(store.max_length, device=change.device)
        prefix = slot < (store.device_lengths - self.score.recent)[:, None, None]
        return self.score.pooled(change, prefix.expand_as(change))

    shares_victims = False

    def check_fixed(self) -> None:
        if self.score.pool != "none":
            raise ValueError(
                f'obcache: pool must be "none" in a fixed store, whose slots have no neighbours, got "{self.score.pool}"'
            )
        if self.score.p != 2 or not self.score.value_norm:
            raise ValueError("obcache: p must be 2 with the norm of v in a fixed store, got another value score")

    def check_ragged(self, window: int | float) -> None:
        raise ValueError(
            "obcache: heads must keep equal numbers of entries while decoding, got heads of different counts"
        )

    def rank_fixed(self, store: FixedStore) -> dict[str, Any]:
        return {"scores": store.beside["change"]}

    def attend_fixed(self, store: FixedStore, query: Tensor, *, softmax_scale: float) -> Tensor:
        out, lse, logits = decode_attention(
            query, store.keys, store.values, lengths=store.lengths, softmax_scale=softmax_scale, return_logits=True
        )
        terms: dict[Kind, tuple[Term, ...]] = {
            "value": ("value",),
            "key": ("key",),
            "joint": ("value", "key", "cross") if self.score.cross else ("value", "key"),
        }
        output_terms_(
            store.beside["change"],
            out,
            store.values,
            logits,
            lse,
            lengths=store.lengths[:, 0],
            terms=terms[self.score.kind],
            decay=0.0 if self.latest_only else 1.0,
        )
        return out

    def __str__(self) -> str:
        return "change of the outputs so far without the entry"


@register("obcache", title="OBCache", paper="arXiv 2510.07651")
@dataclass(frozen=True)
class OBCache(Method):
    """Keeps the entries whose loss would change the attention output most, and the most recent ones.

    To first order, setting an entry's value, key or both to zero changes the outputs O_q of the last `window` prompt tokens by
    ``-A v``, ``-A s (v - O)`` or their sum, with A the attention to the entry and s its logit; the score is the sum of the
    squared changes, see `OutputPerturbation`. The top ``budget - recent`` entries before the recent ones stay.

    Departures from DreamSoul-AI/OBCache, as vendored in ohaoz/obvggt-experiment@77fd8ff:
        - one set a kv head, from the sum over its query heads; ``group_reduce="none"`` is official.
        - float32 but for O, which is in the model's dtype as attention returns it (official: attention too is rounded before
          it is squared; in float16 a masked logit can make it NaN).
        - with ``p=1`` the key's terms keep the 2-norm of v, as the formula has it (official: the 1-norm).
        - by default this is the cut at the end of the prefill, the official scripts' setting, and decoding appends.
          ``decode=True`` goes on as the official class does: a token's own terms are added, then one more entry leaves.
        - padding is masked; equal scores, which max pooling makes in plateaus, go to the smaller position.

    Attributes:
        budget: entries a head keeps, recent ones included.
        kind: "value", "key" or "joint".
        window: observing queries; None: the whole prompt.
        recent: last entries, always kept; None: as many as `window`.
        sink: first entries, always kept.
        p: power of the attention and norm of v in the value's term, 1 or 2.
        value_norm: whether the value's term has the norm of v.
        cross: whether the joint score has its cross term.
        pool: "max" or "avg" over neighbours (SnapKV's form), or "none".
        kernel_size: odd width of the pool.
        group_reduce: "sum" or "none".
        decode: goes on evicting while decoding.
        latest_only: while decoding the newest query alone ranks (TOVA's form); give ``window=1`` for the prompt.
        every: while decoding, lets this many entries come together and then evicts them at once.
    """

    kind: Kind = "joint"
    window: int | None = 32
    recent: int | None = None
    sink: int = 0
    p: Literal[1, 2] = 2
    value_norm: bool = True
    cross: bool = True
    pool: Literal["none", "avg", "max"] = "none"
    kernel_size: int = 7
    group_reduce: Literal["sum", "none"] = "sum"
    decode: bool = False
    latest_only: bool = False
    every: int = 1

    def stages(self) -> Stages:
        recent = self.window if self.recent is None else self.recent
        if recent is None:
            raise ValueError("obcache: recent must be given where the whole prompt observes, got None")
        keep = select.TopK(sink=self.sink, window=recent)
        if isinstance(self.budget, int) and self.budget <= keep.forced:
            raise ValueError(f"obcache: budget must be more than the {keep.forced} forced entries, got {self.budget}")
        change = OutputPerturbation(
            kind=self.kind,
            queries=ALL_QUERIES if self.window is None else self.window,
            recent=recent,
            p=self.p,
            value_norm=self.value_norm,
            cross=self.cross,
            pool=self.pool,
            kernel_size=self.kernel_size,
            group_reduce=self.group_reduce,
        )
        stages = Stages(score=change, budget=budget.Uniform(self.budget), select=keep)
        if not self.decode:
            return stages
        return replace(stages, when=EveryStep(every=self.every), decode=PerturbationSums(change, self.latest_only))
