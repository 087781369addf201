"""RaggedFixedStore: a fixed store whose heads hold different numbers of entries, in packed buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress.cache import DenseStore
from kvcompress.decode import ragged_decode_attention
from kvcompress.evict import ragged_evict_append_
from kvcompress.fixed import FixedStore, Turnover
from kvcompress.observed import observed_ragged_decode_attention_
from kvcompress.ragged import RaggedStore

__all__ = ["RaggedFixedStore"]


class RaggedFixedStore(FixedStore):
    """One layer's entries in slots of no order, a stretch of them for each head: AdaKV's or LAVa's prompt, decoded at fixed room.

    A head that evicts keeps the number of entries that the prompt's cut gave it, for ever; one that does not has `room` free slots
    behind them. Steps and launches are those of `FixedStore`, over the ragged ops.

    Attributes:
        keys, values: ``[slots, head_dim]``.
        positions: ``[slots]`` int32.
        row_start: ``[batch * heads]`` int64, the first slot of each head.
        lengths, seen, limits: ``[batch * heads]`` int32 on the device.
        beside: numbers of each entry, ``[slots, ...]`` float32.
        max_length: what no head's length exceeds, as the launches of a step are planned for it.
    """

    row_start: Tensor

    def __init__(self, turnover: Turnover) -> None:
        super().__init__(turnover)
        self.max_length = 0
        self._heads = 0
        self._batch = 0

    @property
    def heads(self) -> int:
        return self._heads

    @property
    def head_lengths(self) -> list[list[int]]:
        return self.lengths.view(self._batch, self._heads).tolist()

    @property
    def row_seen(self) -> list[int]:
        return self.seen.view(self._batch, self._heads)[:, 0].tolist()

    def load(self, store: DenseStore | RaggedStore, *, room: int, capacity: int | None = None) -> None:
        """Takes over a compressed prompt, see `FixedStore.load`. Buffers are used again as long as it fits into them.

        Args:
            store: the prompt, cut, or whole where nothing was to be dropped.
            room: tokens to come where nothing is evicted.
            capacity: slots a head on the mean of a row; None: as many as needed.

        Raises:
            ValueError: fewer slots than needed.
        """
        rule, lengths = self.turnover, store.head_lengths
        targets = store.lengths if store.targets is None else store.targets
        if rule.evicts:
            limits = [_limits(row, target, rule.on_top) for row, target in zip(lengths, targets)]
            self.window = rule.window(targets)
        else:
            limits = [[n + room for n in row] for row in lengths]
        batch, heads = len(lengths), len(lengths[0]) if lengths else 0
        longest = max(map(sum, limits), default=0)
        if capacity is not None:
            if capacity * heads < longest:
                raise ValueError(
                    f"FixedStore: capacity must be at least the {-(-longest // heads)} entries a head that may come, got {capacity}"
                )
            longest = capacity * heads
        self._allocate_packed(store, batch, heads, longest)
        self._place(store, lengths, limits)

    def _allocate_packed(self, store: DenseStore | RaggedStore, batch: int, heads: int, longest: int) -> None:
        """Room for rows of at most `longest` entries in all their heads."""
        new, dim = store.keys.new_empty, (store.keys.shape[-1], store.values.shape[-1])
        if self._dropped is not None:
            held = (
                self._batch,
                self._heads,
                self.keys.shape[-1],
                self.values.shape[-1],
                self.keys.dtype,
                self.keys.device,
            )
            if held == (batch, heads, *dim, store.keys.dtype, store.keys.device) and longest <= self.max_length:
                return
        self._batch, self._heads, self.max_length = batch, heads, longest
        slots = batch * longest
        self.keys, self.values = new((slots, dim[0])), new((slots, dim[1]))
        self.positions = new((slots,), dtype=torch.int32)
        self.row_start = new((batch * heads,), dtype=torch.int64)
        self.lengths, self.seen, self.limits, self._dropped = (
            new((batch * heads,), dtype=torch.int32) for _ in range(4)
        )
        self.beside = {name: t.new_empty((slots, *t.shape[3:])) for name, t in store.beside.items()}
        for tensor in self.tensors:
            torch._dynamo.mark_static_address(tensor)

    def _place(
        self, store: DenseStore | RaggedStore, lengths: Sequence[Sequence[int]], limits: Sequence[Sequence[int]]
    ) -> None:
        """Copies the entries of each head to its own stretch."""
        device = self.keys.device

        def flat(rows: Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor([n for row in rows for n in row], dtype=torch.int64).to(device)

        counts, rooms = flat(lengths), flat(limits)
        self.row_start.copy_(rooms.cumsum(0) - rooms)
        total = sum(map(sum, lengths))
        head = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=total)
        entry = torch.arange(total, device=device) - (counts.cumsum(0) - counts)[head]
        to = self.row_start[head] + entry
        if isinstance(store, RaggedStore):
            source = store.row_start[head] + entry
            theirs = (store.keys, store.values, store.positions)
        else:
            source = head * store.keys.shape[2] + entry
            theirs = (store.keys.flatten(0, 2), store.values.flatten(0, 2), store.positions.flatten())
        for mine, other in zip((self.keys, self.values, self.positions), theirs):
            mine.zero_().index_copy_(0, to, other.index_select(0, source))
        for name, mine in self.beside.items():
            mine.zero_().index_copy_(0, to, store.beside[name].flatten(0, 1)[head, entry])
        seen = [[n] * self._heads for n in store.seen]
        assert self._dropped is not None
        for counter, numbers in ((self.lengths, counts), (self.seen, flat(seen)), (self.limits, rooms)):
            counter.copy_(numbers)
        self._dropped.copy_(self.seen - self.lengths)

    @property
    def tensors(self) -> list[Tensor]:
        return [] if self._dropped is None else [*super().tensors, self.row_start]

    def _append(self, keys: Tensor, values: Tensor, inv_freq: Tensor | None) -> None:
        rule = self.turnover
        ragged_evict_append_(
            [self.keys, self.values],
            [keys, values],
            self.positions,
            self.row_start,
            self.lengths,
            self.seen,
            self.limits,
            max_length=self.max_length,
            sink=rule.sink,
            window=self.window,
            **({} if rule.statistic is None else rule.statistic.rank_fixed(self)),
        )

    def _attend(self, query: Tensor, softmax_scale: float) -> Tensor:
        if self.turnover.statistic is not None:
            return self.turnover.statistic.attend_fixed(self, query, softmax_scale=softmax_scale)
        return ragged_decode_attention(query, *self._where, max_length=self.max_length, softmax_scale=softmax_scale)[0]

    def observe(self, query: Tensor, *, softmax_scale: float, **watched: Any) -> Tensor:
        options: dict[str, Any] = {"max_length": self.max_length, "softmax_scale": softmax_scale, **watched}
        return observed_ragged_decode_attention_(query, *self._where, **options)[0]

    @property
    def _where(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.row_start, self.lengths

    def select_rows(self, rows: Tensor) -> None:
        """Not for heads of different counts: the stretches of one row do not fit those of another."""
        raise NotImplementedError(
            "FixedStore.select_rows: rows must stay where they are in a store whose heads have stretches of their own; use "
            "CompressedCache for beams"
        )

    def ordered_positions(self) -> Tensor:
        """Positions of the entries, ascending, ``[batch, heads, longest]`` int32, -1 behind the last one; waits for the device."""
        longest = max((n for row in self.head_lengths for n in row), default=0)
        entry = torch.arange(longest, device=self.keys.device)
        is_held = entry < self.lengths[:, None]
        slots = torch.where(is_held, self.row_start[:, None] + entry, 0)
        end = torch.iinfo(torch.int32).max
        ordered = self.positions[slots].masked_fill(~is_held, end).sort(-1).values
        return ordered.masked_fill(ordered == end, -1).view(self._batch, self._heads, longest)


def _limits(lengths: Sequence[int], target: int, on_top: int) -> list[int]:
    """Entries that each head of a row may hold: what the cut gave it, or the budget where there was nothing to cut."""
    whole = len(set(lengths)) <= 1 and all(n < target for n in lengths)
    return [(target if whole else n) + on_top for n in lengths]
