"""Statistics: what is measured of each entry while decoding, so that later evictions know whom to drop.

A statistic starts with the prompt, is brought up to date by every attention after it (it runs that attention itself, so the
probabilities are those of the pass over K that is needed anyway), and ranks the entries when somebody has to leave. Its
numbers lie beside the entries of the store and move with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvcompress.cache import DenseStore
from kvcompress.decode import decode_attention
from kvcompress.evict import history_scores
from kvcompress.layer import LayerState
from kvcompress.ragged import RaggedStore
from kvcompress.score import ReceivedAttention

if TYPE_CHECKING:
    from kvcompress.fixed import FixedStore

__all__ = ["FixedStatistic", "History", "Latest", "Observed", "Rescored", "Statistic", "Sums"]

Scores = Callable[[Any], Tensor]  # a score stage -> its scores of the layer, computed once

_QUERIES = 8  # what one call of decode_attention takes


class Statistic(Protocol):
    """Ranks entries while decoding.

    `queries` is how many of the last prompt queries `start` looks at.
    """

    @property
    def queries(self) -> int: ...

    def start(self, layer: LayerState, store: DenseStore | RaggedStore, scores: Scores) -> None:
        """At the end of the prefill: the first numbers of what `store` keeps of `layer`.

        A ragged store comes only where later evictions are those of a fixed store.
        """
        ...

    def attend(
        self, store: DenseStore, query: Tensor, *, softmax_scale: float, real: Sequence[int] | None = None
    ) -> Tensor:
        """Attention of the tokens that `store` has just been given, and what it says about the entries.

        `query` is ``[batch, num_q_heads, n, head_dim]``; the last ``real[b]`` of row b are tokens, None: all.
        """
        ...

    def rank(self, store: DenseStore) -> Tensor:
        """``[batch, heads, max_length]`` float32, higher = keep."""
        ...


@runtime_checkable
class FixedStatistic(Protocol):
    """A statistic that also knows a `FixedStore`, whose slots are in no order.

    `shares_victims`: all heads of a layer drop the same entry.
    """

    @property
    def shares_victims(self) -> bool: ...

    def check_fixed(self) -> None:
        """Raises ValueError for parameters that a fixed store cannot follow."""
        ...

    def check_ragged(self, window: int | float) -> None:
        """Raises ValueError where heads of different counts cannot be followed; `window` is how many of the newest stay."""
        ...

    def rank_fixed(self, store: FixedStore) -> dict[str, Any]:
        """What `evict_append_` ranks by: its arguments scores, history and fuse."""
        ...

    def attend_fixed(self, store: FixedStore, query: Tensor, *, softmax_scale: float) -> Tensor:
        """Attention of the at most 8 tokens just stored, and what it says about the entries."""
        ...


@dataclass(frozen=True)
class Observed:
    """A few queries of one attention, and what they saw.

    Attributes:
        query: ``[batch, num_q_heads, n, head_dim]``.
        out: ``[batch, num_q_heads, n, head_dim]``.
        lse: ``[batch, num_q_heads, n]`` float32.
        logits: ``[batch, num_q_heads, n, max_length]`` float32, scaled, -inf where not visible.
        position: ``[batch, n]`` position of each query; below 0: padding, which says nothing.
        last: the newest query of the forward is among them.
    """

    query: Tensor
    out: Tensor
    lse: Tensor
    logits: Tensor
    position: Tensor
    last: bool

    @property
    def is_token(self) -> Tensor:
        """``[batch, 1, n, 1]``."""
        return (self.position >= 0)[:, None, :, None]

    def probabilities(self) -> Tensor:
        """``[batch, num_q_heads, n, max_length]`` float32, 0 for padding."""
        return (self.logits - self.lse[..., None]).exp().masked_fill(~self.is_token, 0)


def attend_and_observe(
    store: DenseStore,
    query: Tensor,
    observe: Callable[[Observed], None],
    *,
    softmax_scale: float,
    real: Sequence[int] | None = None,
) -> Tensor:
    """Attention of the newest tokens over a store, at most 8 queries at a time; `observe` is shown each of these calls."""
    new, parts = query.shape[2], []
    keys, values = store.view()
    device = query.device
    seen = torch.tensor(store.seen, device=device)[:, None]
    skipped = torch.tensor([0] * store.batch if real is None else [new - n for n in real], device=device)[:, None]
    for first in range(0, new, _QUERIES):
        last = min(first + _QUERIES, new)
        rows = query[:, :, first:last]
        lengths = (store.device_lengths - (new - last)).clamp(min=0)  # later tokens are stored, but not visible yet
        out, lse, logits = decode_attention(
            rows, keys, values, lengths=lengths, softmax_scale=softmax_scale, return_logits=True
        )
        step = torch.arange(first, last, device=device)
        position = torch.where(step >= skipped, seen - new + step, -1)
        observe(Observed(rows, out, lse, logits, position, last == new))
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def kept_of(full: Tensor, layer: LayerState, store: DenseStore | RaggedStore, fill: float) -> Tensor:
    """What a store keeps of numbers ``[batch, heads, seq_len, ...]`` of a prompt: ``[batch, heads, slots, ...]``."""
    start = torch.tensor([layer.seq_len - n for n in layer.lengths], device=full.device)[:, None, None]
    positions = store.padded_positions() if isinstance(store, RaggedStore) else store.positions
    column = (positions.long() + start).clamp(0, layer.seq_len - 1)
    column = column.view(*column.shape, *[1] * (full.dim() - 3)).expand(*column.shape, *full.shape[3:])
    kept = full.gather(2, column)
    if isinstance(store, DenseStore):
        return held(kept, store, fill)
    return kept.masked_fill((positions < 0).view(*positions.shape, *[1] * (full.dim() - 3)), fill)


def held(t: Tensor, store: DenseStore, fill: float) -> Tensor:
    """`t` ``[batch, heads, slots, ...]`` with `fill` behind the entries of each row."""
    slot = torch.arange(t.shape[2], device=t.device)
    behind = (slot >= store.device_lengths[:, None])[:, None]
    return t.masked_fill(behind.view(*behind.shape, *[1] * (t.dim() - 3)), fill)


def by_kv_head(t: Tensor, store: DenseStore | RaggedStore) -> Tensor:
    """``[batch, num_q_heads, ...]`` as ``[batch, stored heads, q_per_kv, ...]``."""
    return t.unflatten(1, (store.heads if isinstance(store, RaggedStore) else store.keys.shape[1], -1))


@dataclass(frozen=True)
class Sums:
    """Attention that every entry has received so far: ``sums(j) = sum over all queries i of reduce over heads of P[h, i, j]``.

    Starts with the column sums of the prompt's own attention (`first`), float32 throughout.

    Attributes:
        first: the score stage that gives the prompt's sums.
        group_reduce: "mean" or "sum" over the query heads of a stored head.
        decay: factor of the old sums at every new query; 1: nothing is forgotten.
        per_viewer: ranks by the sum divided by the number of queries that have seen the entry.
    """

    first: ReceivedAttention
    group_reduce: Literal["mean", "sum"] = "mean"
    decay: float = 1.0
    per_viewer: bool = False

    def __post_init__(self) -> None:
        if self.group_reduce not in ("mean", "sum"):
            raise ValueError(f'Sums: group_reduce must be "mean" or "sum" while decoding, got {self.group_reduce!r}')
        if not 0 < self.decay <= 1:
            raise ValueError(f"Sums: decay must be in (0, 1], got {self.decay}")

    @property
    def queries(self) -> int:
        return self.first.queries

    def start(self, layer: LayerState, store: DenseStore | RaggedStore, scores: Scores) -> None:
        store.put_beside("sums", kept_of(scores(self.first), layer, store, 0.0), fill=0.0)

    def attend(
        self, store: DenseStore, query: Tensor, *, softmax_scale: float, real: Sequence[int] | None = None
    ) -> Tensor:
        def observe(seen: Observed) -> None:
            sums = store.beside["sums"][:, :, : store.max_length]
            weighted = seen.probabilities()
            if self.decay != 1:
                later = seen.is_token.flip(2).cumsum(2).flip(2) - seen.is_token.long()
                weighted = weighted * self.decay**later
                sums *= self.decay ** seen.is_token.sum(2)
            received = by_kv_head(weighted.sum(2), store)
            sums += received.mean(2) if self.group_reduce == "mean" else received.sum(2)

        return attend_and_observe(store, query, observe, softmax_scale=softmax_scale, real=real)

    def rank(self, store: DenseStore) -> Tensor:
        sums = store.beside["sums"][:, :, : store.max_length]
        if not self.per_viewer:
            return sums
        seen = torch.tensor(store.seen, device=sums.device)[:, None, None]
        return sums / (seen - store.positions[:, :, : store.max_length]).clamp(min=1)

    shares_victims = False

    def check_fixed(self) -> None:
        if self.per_viewer:
            raise ValueError(
                "Sums: per_viewer must be False in a fixed store, which ranks by the sums themselves, got True"
            )

    def check_ragged(self, window: int | float) -> None:
        """Nothing is refused."""

    def rank_fixed(self, store: FixedStore) -> dict[str, Any]:
        return {"scores": store.beside["sums"]}

    def attend_fixed(self, store: FixedStore, query: Tensor, *, softmax_scale: float) -> Tensor:
        watched = {"sums": store.beside["sums"], "decay": self.decay, "group_reduce": self.group_reduce}
        return store.observe(query, softmax_scale=softmax_scale, **watched)

    def __str__(self) -> str:
        return "attention received so far"


@dataclass(frozen=True)
class Latest:
    """Attention that the newest token pays: ``latest(j) = mean over heads h of P[h, last, j]``.

    Attributes:
        first: the score stage that says what the last prompt token pays.
        shared: mean over all heads of the layer, so that all drop the same entry.
    """

    first: ReceivedAttention
    shared: bool = True

    @property
    def queries(self) -> int:
        return self.first.queries

    def start(self, layer: LayerState, store: DenseStore | RaggedStore, scores: Scores) -> None:
        store.put_beside("latest", kept_of(scores(self.first), layer, store, 0.0), fill=0.0)

    def attend(
        self, store: DenseStore, query: Tensor, *, softmax_scale: float, real: Sequence[int] | None = None
    ) -> Tensor:
        def observe(seen: Observed) -> None:
            if seen.last:
                paid = by_kv_head(seen.probabilities()[:, :, -1], store).mean(2)
                kept = store.beside["latest"][:, :, : store.max_length]
                kept.copy_(torch.where(seen.is_token[:, :, -1], paid, kept))

        return attend_and_observe(store, query, observe, softmax_scale=softmax_scale, real=real)

    def rank(self, store: DenseStore) -> Tensor:
        latest = store.beside["latest"][:, :, : store.max_length]
        # as many query heads stand behind every stored head, so the mean of their means is the mean over all
        return latest.mean(1, keepdim=True).expand_as(latest).contiguous() if self.shared else latest

    @property
    def shares_victims(self) -> bool:
        return self.shared

    def check_fixed(self) -> None:
        """Nothing is refused."""

    def check_ragged(self, window: int | float) -> None:
        if self.shared:
            raise ValueError(
                "Latest: shared must be False for heads of different counts, which drop entries of their own, got True"
            )

    def rank_fixed(self, store: FixedStore) -> dict[str, Any]:
        return {"scores": store.beside["latest"]}

    def attend_fixed(self, store: FixedStore, query: Tensor, *, softmax_scale: float) -> Tensor:
        return store.observe(query, softmax_scale=softmax_scale, sums=store.beside["latest"], decay=0.0)

    def __str__(self) -> str:
        return "attention of the newest token"


@dataclass(frozen=True)
class History:
    """Attention of the last `window` tokens, as their logits over what is stored now: MorphKV's ring of rows.

    ``rank(j) = fuse over rows r of softmax over j of (sum over the query heads of a stored head of their logits)``, where j runs
    over the stored entries that precede all rows, so neither the rows' own tokens nor what was evicted take part. Row r of the
    ring is position ``p`` with ``p % window == r``; an entry that came later than a row stands at -inf in it.

    Beside each entry lie `window` float32 numbers: ``4 * heads * entries * window`` bytes a row of the batch.

    Attributes:
        window: rows.
        fuse: "sum" or "max" over them.
    """

    window: int
    fuse: Literal["sum", "max"] = "sum"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"History: window must be at least 1, got {self.window}")
        if self.fuse not in ("sum", "max"):
            raise ValueError(f'History: fuse must be "sum" or "max", got {self.fuse!r}')

    @property
    def queries(self) -> int:
        return self.window

    def start(self, layer: LayerState, store: DenseStore | RaggedStore, scores: Scores) -> None:
        query = layer.window(self.window)
        length = torch.tensor(layer.lengths, device=query.device)[:, None]
        position = length - query.shape[2] + torch.arange(query.shape[2], device=query.device)
        summed = by_kv_head(query.float() * layer.softmax_scale, store).sum(2)
        if isinstance(store, RaggedStore):
            keys = layer.keys.repeat_interleave(store.heads // layer.keys.shape[1], 1)
            rows = summed @ kept_of(keys, layer, store, 0.0).float().mT
            rows = rows.masked_fill((store.padded_positions() < 0)[:, :, None], -torch.inf)
            history = rows.new_full((*rows.shape[:2], rows.shape[3], self.window), -torch.inf)
            store.put_beside("history", self._with_rows(history, rows, position), fill=-torch.inf)
            return
        keys = store.keys
        history = torch.full((*keys.shape[:3], self.window), -torch.inf, dtype=torch.float32, device=keys.device)
        store.put_beside("history", history, fill=-torch.inf)
        self._write(store, summed @ keys[:, :, : store.max_length].float().mT, position)

    def _write(self, store: DenseStore, rows: Tensor, position: Tensor) -> None:
        """Puts rows ``[batch, heads, n, max_length]`` into the ring; those of positions below 0 are padding."""
        history = store.beside["history"][:, :, : store.max_length]
        slot = torch.arange(store.max_length, device=rows.device)
        rows = rows.masked_fill((slot >= store.device_lengths[:, None])[:, None, None], -torch.inf)
        self._with_rows(history, rows, position)

    def _with_rows(self, history: Tensor, rows: Tensor, position: Tensor) -> Tensor:
        """`history`, with its ring's columns of these positions written in place."""
        column = (position % self.window)[:, None, None].expand(-1, *history.shape[1:3], -1)
        is_token = (position >= 0)[:, None, None]
        return history.scatter_(3, column, torch.where(is_token, rows.mT, history.gather(3, column)))

    def attend(
        self, store: DenseStore, query: Tensor, *, softmax_scale: float, real: Sequence[int] | None = None
    ) -> Tensor:
        def observe(seen: Observed) -> None:
            newest = slice(-self.window, None)  # of several queries in one slot of the ring the last one counts
            self._write(store, by_kv_head(seen.logits, store).sum(2)[:, :, newest], seen.position[:, newest])

        return attend_and_observe(store, query, observe, softmax_scale=softmax_scale, real=real)

    def rank(self, store: DenseStore) -> Tensor:
        history = store.beside["history"][:, :, : store.max_length]
        slot = torch.arange(store.max_length, device=history.device)
        before = slot < (store.device_lengths - self.window)[:, None, None]
        history = history.masked_fill(~before[..., None], -torch.inf)
        norm = history.logsumexp(2, keepdim=True)
        share = (history - norm.masked_fill(norm.isneginf(), 0)).exp()
        return share.sum(3) if self.fuse == "sum" else share.amax(3)

    shares_victims = False

    def check_fixed(self) -> None:
        """Nothing is refused."""

    def check_ragged(self, window: int | float) -> None:
        if window != self.window:
            raise ValueError(
                f"History: window must be the selection's, {window} newest entries, for heads of different counts, got {self.window}"
            )

    def rank_fixed(self, store: FixedStore) -> dict[str, Any]:
        history = store.beside["history"]
        if store.window == self.window:
            return {"history": history, "fuse": self.fuse}
        scores = history_scores(history, store.positions, store.lengths, store.seen, window=self.window, fuse=self.fuse)
        return {"scores": scores, "history": history}

    def attend_fixed(self, store: FixedStore, query: Tensor, *, softmax_scale: float) -> Tensor:
        watched = {"history": store.beside["history"], "seen": store.seen, "group_reduce": "sum"}
        return store.observe(query, softmax_scale=softmax_scale, **watched)

    def __str__(self) -> str:
        return f"attention of the last {self.window} tokens"


@dataclass(frozen=True)
class Rescored:
    """A score stage, asked again over what is stored, with the last queries seen: any score that needs no more than these.

    Attributes:
        score: a stage with ``while_decoding = True``: it asks neither for positions nor for entries that are gone.
    """

    score: Any

    def __post_init__(self) -> None:
        if not getattr(self.score, "while_decoding", False):
            raise ValueError(
                "Rescored: score must be one that can rank what is left of a prompt again (it needs neither positions nor "
                f"all queries), got {type(self.score).__name__}"
            )

    @property
    def queries(self) -> int:
        return int(self.score.queries)

    def start(self, layer: LayerState, store: DenseStore | RaggedStore, scores: Scores) -> None:
        if self.queries == 0:
            return
        query = layer.window(self.queries)
        wide = query.new_zeros((*query.shape[:2], self.queries, query.shape[3]))
        wide[:, :, self.queries - query.shape[2] :] = query
        store.extra["queries"] = wide
        store.extra["queries_scale"] = torch.full((query.shape[0],), layer.softmax_scale, dtype=torch.float64)

    def attend(
        self, store: DenseStore, query: Tensor, *, softmax_scale: float, real: Sequence[int] | None = None
    ) -> Tensor:
        if self.queries:
            self._roll(store, query, real)
        return store.attend(query, softmax_scale=softmax_scale)

    def _roll(self, store: DenseStore, query: Tensor, real: Sequence[int] | None) -> None:
        known = torch.cat([store.extra["queries"], query], 2)
        end = known.shape[2]
        if real is None or min(real) == query.shape[2]:
            store.extra["queries"] = known[:, :, -self.queries :].clone()
            return
        for row, n in enumerate(real):  # padding stands between the old queries and the new ones
            kept = torch.cat([known[row, :, : self.queries], known[row, :, end - n :]], 1)
            store.extra["queries"][row] = kept[:, kept.shape[1] - self.queries :]

    def rank(self, store: DenseStore) -> Tensor:
        keys, values = store.prompt()
        start = None
        if not store.is_uniform:
            start = torch.tensor([store.max_length - n for n in store.lengths], dtype=torch.int32, device=keys.device)
        queries = store.extra.get("queries")
        scale = float(store.extra["queries_scale"][0]) if queries is not None else 1.0
        if queries is not None:
            queries = queries[:, :, -min(self.queries, store.max_length) :]
        scores = self.score(LayerState(0, 1, queries, keys, values, list(store.lengths), scale, seq_start=start))
        if start is None:
            return scores
        slot = torch.arange(store.max_length, device=scores.device) + start[:, None, None]
        return scores.gather(2, slot.clamp(max=store.max_length - 1).expand_as(scores))

    def __str__(self) -> str:
        return f"{self.score}, over what is stored"
