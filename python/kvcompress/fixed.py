"""FixedStore: a layer in buffers of fixed room, whose decode steps have the same shapes and launches for ever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.cache import DenseStore
from kvcompress.decode import decode_attention
from kvcompress.evict import evict_append_
from kvcompress.observed import observed_decode_attention_
from kvcompress.pipeline import Stages
from kvcompress.ragged import RaggedStore
from kvcompress.rotary import SinkRotation
from kvcompress.select import TopK, TopKRecent
from kvcompress.statistic import FixedStatistic
from kvcompress.when import EveryStep

__all__ = ["FixedStore", "Turnover"]

_NEW = 8  # tokens that one call of the ops takes


@dataclass(frozen=True)
class Turnover:
    """What becomes of a fixed store while decoding: who leaves for whom, or how many may come.

    Attributes:
        evicts: a full store overwrites; otherwise `room` tokens more fit, and nobody leaves.
        on_top: entries above the budget that attention sees, the newest among them.
        sink: first tokens that never leave.
        recent: newest tokens that do not leave: a count, or a share of the budget. They are told by their positions, so where
            a prompt was cut by another method than goes on, those of them that it did not keep are not replaced by older ones.
        statistic: what entries are ranked by; None: the oldest leaves.
        rotates: sinks that move up to stand before the window (StreamingLLM), else 0.
        is_ragged: heads hold different numbers of entries, each its own for ever (see `kvcompress.fixed_ragged`).
    """

    evicts: bool = False
    on_top: int = 0
    sink: int = 0
    recent: int | float = 0
    statistic: FixedStatistic | None = None
    rotates: int = 0
    is_ragged: bool = False

    @classmethod
    def of(cls, stages: Stages) -> Turnover:
        """The same evictions as `Pipeline` makes, one entry at a time.

        Raises:
            ValueError: evictions that one overwritten slot a token cannot make; the sentence says why.
        """
        when, select = stages.when, stages.reselect or stages.select
        if not isinstance(when, EveryStep):
            return cls(is_ragged=stages.is_ragged)
        if when.every > 1 or when.growth > 1 or when.keep is not None or when.lazy:
            raise ValueError(
                "FixedStore: evictions must be one entry a token, to a budget that stays; got bursts, a growing budget or a "
                "prompt that is not cut, which need CompressedCache"
            )
        if stages.decode is not None and not isinstance(stages.decode, FixedStatistic):
            raise ValueError(
                f"FixedStore: entries must be ranked by a statistic that knows slots in no order, got {type(stages.decode).__name__}"
            )
        if isinstance(select, TopKRecent):
            sink, recent = 0, select.recent
        elif isinstance(select, TopK):
            sink, recent = select.sink, select.window
        else:
            raise ValueError(f"FixedStore: select must be TopK or TopKRecent, got {type(select).__name__}")
        if stages.decode is not None:
            stages.decode.check_fixed()
            if stages.is_ragged:
                stages.decode.check_ragged(recent)
        rotates = stages.attend.sink if isinstance(stages.attend, SinkRotation) else 0
        on_top = 0 if when.before_attention and when.counts_new else 1
        return cls(True, on_top, sink, recent, stages.decode, rotates, stages.is_ragged)

    def window(self, targets: Sequence[int]) -> int:
        """Newest tokens that do not leave."""
        if not isinstance(self.recent, float):
            return self.recent
        windows = {int(self.recent * target) for target in targets}
        if len(windows) > 1:
            raise ValueError(
                f"FixedStore: recent must be a count where the rows of a batch have budgets of their own, got the share {self.recent}"
            )
        return windows.pop()


class FixedStore:
    """One layer's entries in slots of no order: a new token takes a free slot, then that of the entry that matters least.

    All counters live on the device and every step is the same few launches of the same shapes: one that ranks, evicts and
    appends (`evict_append_`, which moves StreamingLLM's sinks as well), two of decode attention, observed where a statistic
    wants it, and for OBCache one that looks at the values again: three launches a layer, at most four (a store by query heads
    has copies of the new K and V made before). So a step can be compiled or captured in a CUDA graph and then serves any prompt. Buffers keep their addresses as
    long as the sizes stay.

    Attributes:
        keys, values: ``[batch, heads, capacity, head_dim]``.
        positions: ``[batch, units, capacity]`` int32, the token that each slot holds; units: the heads, or 1 where all drop the
            same entry.
        lengths, seen, limits: ``[batch, units]`` int32 on the device: entries, tokens seen, entries that fit.
        beside: numbers of each entry, ``[batch, heads, capacity, ...]`` float32.
        window: newest tokens that do not leave.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor
    seen: Tensor
    limits: Tensor

    def __init__(self, turnover: Turnover) -> None:
        self.turnover = turnover
        self.beside: dict[str, Tensor] = {}
        self.window = 0
        self.sink_keys: Tensor | None = None
        self._dropped: Tensor | None = None  # entries that the prompt lost; None: nothing is loaded

    def load(self, store: DenseStore | RaggedStore, *, room: int, capacity: int | None = None) -> None:
        """Takes over a compressed prompt. Buffers of the same sizes are used again, at the same addresses.

        Args:
            store: the prompt, cut; it can be freed afterwards.
            room: tokens to come where nothing is evicted.
            capacity: slots; None: as many as needed.

        Raises:
            ValueError: fewer slots than needed.
        """
        assert isinstance(store, DenseStore), "heads of different counts are those of a RaggedFixedStore"
        rule = self.turnover
        batch, heads, _, head_dim = store.keys.shape
        targets = store.lengths if store.targets is None else store.targets
        if rule.evicts:
            limits = [max(target + rule.on_top, length) for target, length in zip(targets, store.lengths)]
            self.window = rule.window(targets)
        else:
            limits = [length + room for length in store.lengths]
        most = max(limits, default=0)
        if capacity is not None and capacity < most:
            raise ValueError(f"FixedStore: capacity must be at least the {most} entries that may come, got {capacity}")
        if rule.rotates and min(store.seen) < rule.rotates:
            raise ValueError(
                f"FixedStore: prompts must have at least the {rule.rotates} sinks that are moved later, got {min(store.seen)} tokens"
            )
        capacity = capacity or most
        if not rule.evicts and capacity > most:
            limits = [capacity] * batch
        units = 1 if rule.statistic is not None and rule.statistic.shares_victims else heads
        self._allocate(store, (batch, heads, capacity, head_dim), units)
        assert self._dropped is not None
        held = store.max_length
        for mine, theirs in self._pairs(store):
            mine.zero_()
            mine[:, :, :held] = theirs[:, : mine.shape[1], :held]
        for counter, numbers in ((self.lengths, store.lengths), (self.seen, store.seen), (self.limits, limits)):
            counter.copy_(torch.tensor(numbers, dtype=torch.int32).to(counter.device)[:, None].expand_as(counter))
        self._dropped.copy_(self.seen - self.lengths)
        if self.sink_keys is not None:
            self.sink_keys.copy_(self.keys[:, :, : rule.rotates])

    def _allocate(self, store: DenseStore, shape: tuple[int, int, int, int], units: int) -> None:
        batch, _, capacity, _ = shape
        wanted = (shape, store.keys.dtype, store.keys.device)
        if self._dropped is not None and (self.keys.shape, self.keys.dtype, self.keys.device) == wanted:
            return
        new = store.keys.new_empty
        self.keys, self.values = new(shape), new((*shape[:3], store.values.shape[3]))
        self.positions = new((batch, units, capacity), dtype=torch.int32)
        self.lengths, self.seen, self.limits, self._dropped = (
            # strides of their own, so that what wants one number a row of the batch gets it without a copy
            store.keys.new_empty_strided((batch, units), (1, batch), dtype=torch.int32)
            for _ in range(4)
        )
        self.beside = {name: t.new_empty((*t.shape[:2], capacity, *t.shape[3:])) for name, t in store.beside.items()}
        self.sink_keys = new((*shape[:2], self.turnover.rotates, shape[3])) if self.turnover.rotates else None
        for tensor in self.tensors:
            torch._dynamo.mark_static_address(tensor)

    def _pairs(self, store: DenseStore) -> list[tuple[Tensor, Tensor]]:
        pairs = [(self.keys, store.keys), (self.values, store.values), (self.positions, store.positions)]
        return pairs + [(mine, store.beside[name]) for name, mine in self.beside.items()]

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that a step reads or writes."""
        if self._dropped is None:
            return []
        own = [self.keys, self.values, self.positions, self.lengths, self.seen, self.limits, self._dropped]
        own += self.beside.values()
        return own if self.sink_keys is None else [*own, self.sink_keys]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: what the allocator holds for this layer."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors)

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def head_lengths(self) -> list[list[int]]:
        """Entries of each row and head; waits for the device."""
        return self.lengths.expand(-1, self.heads).tolist()

    @property
    def row_seen(self) -> list[int]:
        """Tokens that each row has seen; waits for the device."""
        return self.seen[:, 0].tolist()

    def step(
        self, query: Tensor, keys: Tensor, values: Tensor, *, softmax_scale: float, inv_freq: Tensor | None = None
    ) -> Tensor:
        """Stores new tokens, all of them real, and attends with them; 8 at a time.

        Args:
            query: ``[batch, num_q_heads, n, head_dim]``.
            keys, values: ``[batch, num_kv_heads, n, head_dim]``.
            inv_freq: ``[rotary_dim / 2]`` float32, the model's frequencies, where sinks move (StreamingLLM).
        """
        repeats = self.heads // keys.shape[1]
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        parts = []
        for first in range(0, query.shape[2], _NEW):
            span = slice(first, first + _NEW)
            self._append(keys[:, :, span], values[:, :, span], inv_freq)
            parts.append(self._attend(query[:, :, span], softmax_scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _append(self, keys: Tensor, values: Tensor, inv_freq: Tensor | None) -> None:
        rule = self.turnover
        if self.sink_keys is not None and inv_freq is None:
            raise ValueError("FixedStore: inv_freq must be given for in-cache positions, got None")
        ranked = {} if rule.statistic is None else rule.statistic.rank_fixed(self)
        evict_append_(
            [self.keys, self.values],
            [keys, values],
            self.positions,
            self.lengths,
            self.seen,
            limits=self.limits,
            sinks=self.sink_keys,
            inv_freq=None if self.sink_keys is None else inv_freq,
            sink=rule.sink,
            window=self.window,
            **ranked,
        )

    def _attend(self, query: Tensor, softmax_scale: float) -> Tensor:
        statistic = self.turnover.statistic
        if statistic is not None:
            return statistic.attend_fixed(self, query, softmax_scale=softmax_scale)
        return decode_attention(query, self.keys, self.values, lengths=self.lengths, softmax_scale=softmax_scale)[0]

    def observe(self, query: Tensor, *, softmax_scale: float, **watched: Any) -> Tensor:
        """Attention of the tokens just stored, and what `observed_decode_attention_` keeps of it in `watched`."""
        options: dict[str, Any] = {"lengths": self.lengths, "softmax_scale": softmax_scale, **watched}
        return observed_decode_attention_(query, self.keys, self.values, **options)[0]

    # --- what a model loop asks

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back: nobody ever left for them."""
        return not self.turnover.evicts

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens of every row."""
        if not self.is_croppable:
            raise ValueError("FixedStore.crop: tokens must be 0 where entries are overwritten, got " + str(tokens))
        self.lengths.sub_(tokens)
        self.seen.sub_(tokens)

    def check_room(self) -> None:
        """Raises where tokens came that no longer fitted; waits for the device.

        Raises:
            RuntimeError: a store that evicts nothing has been given more tokens than its room.
        """
        if not self.turnover.evicts and self._dropped is not None:
            dropped = (self.seen - self.lengths) - self._dropped
            if bool((dropped > 0).any()):
                raise RuntimeError(
                    f"FixedStore: room must be enough for every new token, got {int(dropped.max())} tokens too many; entries were "
                    "overwritten"
                )

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row ``rows[i]``, in place (beam search)."""
        for tensor in self.tensors:
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))

    def ordered_positions(self) -> Tensor:
        """Positions of the entries, ascending, ``[batch, heads, capacity]`` int32, -1 behind the last one."""
        slot = torch.arange(self.positions.shape[2], device=self.positions.device)
        behind = slot >= self.lengths[..., None]
        end = torch.iinfo(torch.int32).max
        ordered = self.positions.masked_fill(behind, end).sort(-1).values
        return ordered.masked_fill(ordered == end, -1).expand(-1, self.keys.shape[1], -1)
