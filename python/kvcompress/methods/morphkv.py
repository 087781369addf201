"""MorphKV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvcompress import budget, score, select
from kvcompress.cache import DenseStore
from kvcompress.layer import LayerState
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages
from kvcompress.ragged import RaggedStore
from kvcompress.select import topk
from kvcompress.statistic import History, Observed, Scores, attend_and_observe, by_kv_head
from kvcompress.when import EveryStep

Fuse = Literal["sum", "max"]


@dataclass(frozen=True)
class RecentRows:
    """The prompt's score: what `History` ranks by at the end of the prefill, and +inf for the rows' own tokens.

    ``score(j) = fuse over the last `window` queries of softmax over all j before them of (sum over the group of their logits)``.
    """

    window: int
    fuse: Fuse = "sum"
    by_position = False

    @property
    def queries(self) -> int:
        return self.window

    @score.row_by_row
    def __call__(self, layer: LayerState) -> Tensor:
        query = layer.window(self.window).unflatten(1, (layer.keys.shape[1], -1)).float().sum(2) * layer.softmax_scale
        prefix = layer.keys[:, :, : max(0, layer.seq_len - self.window)]
        scores = torch.full(layer.keys.shape[:3], torch.inf, dtype=torch.float32, device=layer.device)
        if prefix.shape[2]:
            rows = torch.cat([query @ part.float().mT for part in prefix.split(score.CHUNK, 2)], -1)
            share = rows.softmax(-1)
            scores[:, :, : prefix.shape[2]] = share.sum(2) if self.fuse == "sum" else share.amax(2)
        return scores

    def __str__(self) -> str:
        return f"attention of the last {self.window} tokens"


@dataclass(frozen=True)
class MisalignedHistory:
    """The official code's rows under grouped queries: cut by another set than the entries that they are rows of.

    K and V are cut by the rank of the group's summed logits, the rows of each query head by that head's own rank, and the step
    attends with the head's own set. From the second eviction on, column i of a row and entry i are different tokens. For
    batches without padding only.
    """

    window: int
    fuse: Fuse
    when: EveryStep

    @property
    def queries(self) -> int:
        return self.window

    def start(self, layer: LayerState, store: DenseStore | RaggedStore, scores: Scores) -> None:
        assert isinstance(store, DenseStore), "heads of different counts evict later in fixed stores only"
        if layer.seq_start is not None:
            raise ValueError("morphkv: rows of a batch must be of one length in the official order, got a padded batch")
        query = layer.window(self.window).float() * layer.softmax_scale
        keys = store.keys[:, :, : store.max_length].float().repeat_interleave(query.shape[1] // store.keys.shape[1], 1)
        rows = query.new_full((*query.shape[:2], self.window, store.max_length), -torch.inf)
        rows[:, :, : query.shape[2]] = query @ keys.mT
        store.extra["rows"] = rows

    def attend(
        self, store: DenseStore, query: Tensor, *, softmax_scale: float, real: Sequence[int] | None = None
    ) -> Tensor:
        if query.shape[2] != 1:
            raise ValueError(f"morphkv: tokens must come one at a time in the official order, got {query.shape[2]}")
        newest: list[Tensor] = []

        def observe(seen: Observed) -> None:
            newest.append(seen.logits)

        out = attend_and_observe(store, query, observe, softmax_scale=softmax_scale, real=real)
        (row,), rows = newest, store.extra["rows"]
        length = store.max_length
        rows = torch.cat([rows, rows.new_full((*rows.shape[:3], 1), -torch.inf)], -1)
        assert store.targets is not None
        if self.when.is_due(length, store.targets[0]):
            rank = self._fused(by_kv_head(rows, store).sum(2))
            store.put_beside("rank", torch.nn.functional.pad(rank, (0, store.capacity - length)), fill=0.0)
            kept = topk(self._fused(rows), store.targets[0], window=self.window + 1).long()
            seen = torch.full_like(row, -torch.inf).scatter(3, kept[:, :, None], row.gather(3, kept[:, :, None]))
            values = store.values[:, :, :length].float().repeat_interleave(row.shape[1] // store.values.shape[1], 1)
            out = (seen.softmax(-1) @ values).to(out.dtype)
            rows = rows.gather(3, kept[:, :, None].expand(-1, -1, self.window, -1))
            row = row.gather(3, kept[:, :, None])
        if length <= self.window:
            rows[:, :, length - 1 : length] = row
        else:
            rows = torch.cat([rows[:, :, 1:], row], 2)
        store.extra["rows"] = rows
        return out

    def _fused(self, rows: Tensor) -> Tensor:
        tail = self.window + 1
        share = rows[..., :-tail].softmax(-1).nan_to_num(0)  # a row of only -inf says nothing
        return torch.nn.functional.pad(share.sum(2) if self.fuse == "sum" else share.amax(2), (0, tail))

    def rank(self, store: DenseStore) -> Tensor:
        return store.beside["rank"][:, :, : store.max_length]

    def __str__(self) -> str:
        return f"attention of the last {self.window} tokens, in the official order"


@register("morphkv", title="MorphKV", paper="arXiv 2503.00979")
@dataclass(frozen=True)
class MorphKV(Method):
    """A cache of constant size: the last `window` tokens and what they attend to most, chosen anew with every token.

    ``rank(j) = fuse over the last `window` tokens r of softmax over the entries j stored before them of (sum over the group of
    q_r k_j / sqrt(d))``. Before a token is stored, those of the lowest rank leave, until `budget` entries are left; the
    token comes on top, so attention sees ``budget + 1`` entries. Nothing else is protected, no sinks. The prompt is cut
    the same way at the end of its prefill, which leaves what the official code leaves after its first decoded token.

    Departures from ghadiaravi13/MorphKV@8903d2a (`sum_fused`, `max_fused`):
        - the stored rows of logits are cut as K and V are. With grouped queries the official code cuts them by another set, so
          from the second eviction on its columns belong to other tokens, and it attends with a third set;
          ``official_order=True`` does the same.
        - one row a kv head (the group's sum, which is all the ranking uses) instead of one a query head.
        - any batch, with padding; several tokens a forward; float32 ranks (official: batch 1, single tokens, model dtype).
        - equal ranks go to the smaller position.

    Attributes:
        budget: entries a head, the newest token not counted (official: max_capacity).
        window: last tokens, always kept, whose attention ranks the others.
        fuse: "sum" or "max" over them.
        evict_after: evict only once the cache holds this many times ``budget + 1``, then all at once (bursts); the prompt
            likewise stays whole below that.
        official_order: as above; batches without padding.
    """

    window: int = 32
    fuse: Fuse = "sum"
    evict_after: float = 1.0
    official_order: bool = False

    def stages(self) -> Stages:
        if isinstance(self.budget, int) and self.budget <= self.window:
            raise ValueError(f"morphkv: budget must be more than the window of {self.window}, got {self.budget}")
        rows = RecentRows(self.window, self.fuse)
        if not self.official_order:
            return Stages(
                score=rows,
                budget=budget.Uniform(self.budget),
                select=select.TopK(window=self.window),
                when=EveryStep(before_attention=True, counts_new=False, growth=self.evict_after),
                decode=History(self.window, self.fuse),
            )
        if not isinstance(self.budget, int):
            raise ValueError(f"morphkv: budget must be an int (entries) in the official order, got {self.budget}")
        # after attention, so the newest token is one of the entries: budget + 1 of them, and window + 1 at the end
        burst = math.ceil((self.budget + 1) * self.evict_after) - (self.budget + 1)
        when = EveryStep(every=max(1, burst), lazy=True)
        return Stages(
            score=rows,
            budget=budget.Uniform(self.budget + 1),
            select=select.TopK(window=self.window + 1),
            when=when,
            decode=MisalignedHistory(self.window, self.fuse, when),
        )
