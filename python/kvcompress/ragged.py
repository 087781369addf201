"""RaggedStore: a layer whose heads keep different numbers of entries, in memory that is really theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kvcompress.attend import attend
from kvcompress.cache import register_store
from kvcompress.decode import ragged_decode_attention
from kvcompress.store import append_, compact_ragged_, gather, gather_ragged

__all__ = ["RaggedStore"]

_QUERIES = 8  # what one call of ragged_decode_attention takes
_FEW = 32  # queries, or as many as there are heads in all, that go through it in turns; more attend head by head, as a prompt does
_GROWTH = (
    8  # a full room is renewed to an eighth of the mean length, at least to `reserve`: amortised O(1) copies a token
)


@register_store
class RaggedStore:
    """One layer's entries with a length of its own for every row and head: packed buffers with room behind each head.

    Head h of row b owns the slots ``[start, start + capacity)`` of the packed buffers, its entries are the first
    ``head_lengths[b][h]`` of them, in ascending order of position; the room behind is finite and for tokens to come, so no
    step copies the cache. A full room is renewed for all heads at once. Lengths live on the device: a decode step is one
    launch that writes K, V and positions, and one that counts.

    Attributes:
        keys, values: ``[total, head_dim]``.
        positions: ``[total]`` int32.
        scores: ``[total]`` float32 as the score stage gave them (later entries +inf), or None.
        seen: real tokens that each row has been given.
        targets: the budget of each row: mean entries a head; None: no budget.
        extra: further tensors ``[batch, ...]`` that some stage keeps beside the entries.
        beside: numbers of each entry as the cut left them, ``[batch, heads, max_length, ...]`` float32, for the fixed store that
            takes the entries over; they do not move with them.
    """

    kind: ClassVar[str] = "ragged"

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        counts: Tensor,
        *,
        total: int,
        seen: Sequence[int],
        scores: Tensor | None = None,
        targets: Sequence[int] | None = None,
        reserve: int = 128,
        room: int | None = None,
    ) -> None:
        """Takes buffers in which every head has `room` free slots (None: `reserve`) behind its entries.

        `counts` are the entries of each head, ``[batch, heads]`` int32 on the device, `total` their sum.
        """
        self.keys, self.values, self.positions, self.scores = keys, values, positions, scores
        self.seen = list(seen)
        self.targets = None if targets is None else list(targets)
        self.reserve = reserve
        self.extra: dict[str, Tensor] = {}
        self.beside: dict[str, Tensor] = {}
        room = reserve if room is None else room
        self._locate(counts, total, room, _starts(counts, room))

    @classmethod
    def gathered(
        cls,
        keys: Tensor,
        values: Tensor,
        index: Tensor,
        indptr: Tensor,
        lengths: Sequence[int],
        *,
        scores: Tensor | None = None,
        reserve: int = 128,
    ) -> RaggedStore:
        """A new store of the rows `index` of a prompt's K and V; the prompt's tensors can be freed afterwards.

        Nothing waits for the device: how many entries there are in all is the length of `index`.

        Args:
            keys, values: ``[batch, num_kv_heads, seq_len, head_dim]``.
            index: ``[total]`` int32, head after head, each ascending, as `topk_ragged` gives it.
            indptr: ``[batch * heads + 1]`` int32, where each head's part begins. More heads than the keys have (a multiple)
                means storage per query head.
            lengths: real tokens of each row.
            scores: ``[batch, heads, seq_len]`` float32 to keep for a later cut.
            reserve: free slots behind each head.
        """
        seq_len, device = keys.shape[2], keys.device
        counts, total = indptr.diff().view(keys.shape[0], -1), index.shape[0]
        first = torch.tensor([seq_len - n for n in lengths], dtype=torch.int32, device=device)
        slots = torch.arange(seq_len, dtype=torch.int32, device=device)
        positions = (slots - first[:, None])[:, None]
        tensors = [keys, values, positions] if scores is None else [keys, values, positions, scores]
        kept = gather_ragged(tensors, index, indptr, _starts(counts, reserve), total=total + reserve * counts.numel())
        beside = None if scores is None else kept[3]
        return cls(kept[0], kept[1], kept[2], counts, total=total, seen=lengths, scores=beside, reserve=reserve)

    def _locate(
        self, counts: Tensor, total: int, room: int, row_start: Tensor, next_position: Tensor | None = None
    ) -> None:
        """Where each head starts and how long it is: on the device, and on the host once somebody asks.

        `room` is how many slots are free behind every head at least, `next_position` what its next token gets (None: `seen`).
        """
        self._batch, self._heads = counts.shape
        self._total = total
        self._held: list[list[int]] | None = None  # entries when last located; `_grown` came later
        self._starts: list[int] = []
        self._grown = [0] * self._batch
        self._room = room
        self._longest = min(total, max(self.seen, default=0))
        self._row_start = row_start
        if next_position is None:
            next_position = torch.tensor(self.seen, dtype=torch.int32, device=counts.device)
            next_position = next_position.repeat_interleave(self._heads)
        flat = counts.reshape(-1)
        self._count(torch.stack([flat, (row_start + flat).int(), next_position]))

    def _on_host(self) -> list[list[int]]:
        """Entries of each head when last located. The first call waits for the device."""
        if self._held is None:
            flat, self._starts = torch.stack([self._row_length.long(), self._row_start]).tolist()
            rows = [flat[b * self._heads : (b + 1) * self._heads] for b in range(self._batch)]
            self._held = [[n - grown for n in row] for row, grown in zip(rows, self._grown)]
            self._longest = max((n for row in self._held for n in row), default=0)
        return self._held

    def _count(self, counters: Tensor) -> None:
        """Counters of every head, a row each, that a decode step counts on together."""
        self._counters = counters
        self._row_length, self._next_slot, self._next_position = counters.unbind()

    # --- what is there

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def heads(self) -> int:
        return self._heads

    @property
    def head_lengths(self) -> list[list[int]]:
        """Stored entries of each row and head, on the host. The first call after a cut waits for the device."""
        return [[n + grown for n in row] for row, grown in zip(self._on_host(), self._grown)]

    @property
    def lengths(self) -> list[int]:
        """Mean entries a head of each row, rounded up."""
        return [-(-sum(row) // max(len(row), 1)) + grown for row, grown in zip(self._on_host(), self._grown)]

    @property
    def max_length(self) -> int:
        """Entries of the longest head; an upper bound until the host has asked for the lengths."""
        return self._longest + max(self._grown, default=0)

    @property
    def total(self) -> int:
        """Entries of all rows and heads, which the host knows without asking."""
        return self._total + self._heads * sum(self._grown)

    @property
    def is_complete(self) -> bool:
        """Nothing was ever dropped."""
        return self.total == self._heads * sum(self.seen)

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {"keys": self.keys, "values": self.values, "positions": self.positions}
        return held if self.scores is None else {**held, "scores": self.scores}

    @property
    def row_start(self) -> Tensor:
        """First slot of each head, ``[batch * heads]`` int64 on the device."""
        return self._row_start

    @property
    def row_lengths(self) -> Tensor:
        """Entries of each head, ``[batch * heads]`` int32 on the device."""
        return self._row_length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room included: what the allocator holds for this layer."""
        held = [*self.tensors.values(), *self.extra.values(), *self.beside.values(), self._row_start, self._counters]
        return sum(t.untyped_storage().nbytes() for t in held)

    def put_beside(self, name: str, tensor: Tensor, *, fill: float) -> None:
        """Keeps numbers ``[batch, heads, max_length, ...]`` float32 of the entries as they are now."""
        self.beside[name] = tensor

    @property
    def entry_nbytes(self) -> int:
        """Bytes of one entry of one head: K, V, position, and what else is kept of it."""
        packed = sum(t[:1].nbytes for t in self.tensors.values())
        return packed + sum(t[:1, :1, :1].nbytes for t in self.beside.values())

    def view(self) -> tuple[Tensor, Tensor]:
        """The packed buffers ``[total, head_dim]``, room included, not copied."""
        return self.keys, self.values

    def attend(self, q: Tensor, *, softmax_scale: float) -> Tensor:
        """Attention of the last tokens over their own rows and heads. See `kvcompress.ragged_decode_attention`."""
        new = q.shape[2]
        if new > max(_FEW, self.batch * self.heads) or not _is_supported(q):
            return self._attend_by_head(q, softmax_scale)
        parts = []
        for first in range(0, new, _QUERIES):
            last = min(first + _QUERIES, new)
            lengths = self.row_lengths
            if last < new:
                lengths = lengths - (new - last)  # later tokens are stored already, but not visible yet
            out, _, _ = ragged_decode_attention(
                q[:, :, first:last],
                self.keys,
                self.values,
                self._row_start,
                lengths,
                max_length=self.max_length,
                softmax_scale=softmax_scale,
            )
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _attend_by_head(self, q: Tensor, softmax_scale: float) -> Tensor:
        group = q.shape[1] // self.heads
        out = q.new_empty((*q.shape[:3], self.values.shape[-1]))
        self._on_host()
        for at, (start, n) in enumerate(zip(self._starts, (n for row in self.head_lengths for n in row))):
            row, head = divmod(at, self.heads)
            mine = slice(head * group, (head + 1) * group)
            keys, values = (t[None, None, start : start + n] for t in (self.keys, self.values))
            out[row : row + 1, mine] = attend(q[row : row + 1, mine], keys, values, softmax_scale=softmax_scale)
        return out

    # --- growing

    def append(self, keys: Tensor, values: Tensor, real: Sequence[int] | None = None) -> None:
        """Writes new tokens behind each head's entries, in place. Arguments as `DenseStore.append`."""
        new, dim = keys.shape[2:]
        added = [new] * self.batch if real is None else list(real)
        most = max(added, default=0)
        repeats = self.heads // keys.shape[1]
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        if most > self._room:
            self._repack(room=max(self.reserve, most, max(self.lengths) // _GROWTH))
        slots, positions = self._next_slot, self._next_position
        step: Tensor | int = new
        if new > 1 or min(added, default=new) < new:
            slots, positions, step = self._places(new, added)
        rows = [keys.reshape(1, 1, -1, dim), values.reshape(1, 1, -1, dim), positions.reshape(1, 1, -1)]
        buffers = [self.keys[None, None], self.values[None, None], self.positions[None, None]]
        if self.scores is not None:
            rows.append(torch.full((1, 1, rows[2].shape[2]), torch.inf, device=keys.device))
            buffers.append(self.scores[None, None])
        append_(buffers, rows, slots.reshape(1, -1))
        self._counters.add_(step)
        self._room -= most
        self._grown = [n + a for n, a in zip(self._grown, added)]
        self.seen = [n + a for n, a in zip(self.seen, added)]

    def _places(self, new: int, added: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Slots and positions ``[batch * heads, new]`` of tokens that may be padding, and what each head's counters grow by."""
        device = self.keys.device
        grown = torch.tensor(added, dtype=torch.int32, device=device).repeat_interleave(self.heads)
        order = torch.arange(new, dtype=torch.int32, device=device) - (new - grown)[:, None]  # below 0: padding
        slots = torch.where(order >= 0, self._next_slot[:, None] + order, -1)
        return slots, self._next_position[:, None] + order, grown

    # --- shrinking

    def keep(self, index: Tensor, indptr: Tensor) -> None:
        """Keeps the entries `index` of each head and drops all others.

        In place where the freed slots are wanted as room; into smaller buffers, one after the other, where that gives memory
        back. Nothing waits for the device.

        Args:
            index: ``[total]`` int32, head after head, each ascending: which of the head's own entries.
            indptr: ``[batch * heads + 1]`` int32, where each head's part begins.
        """
        counts, total = indptr.diff().view(self._batch, self._heads), index.shape[0]
        if self.keys.shape[0] <= total + 2 * self.reserve * counts.numel():
            compact_ragged_(list(self.tensors.values()), index, indptr, self._row_start)
            self._locate(counts, total, self._room, self._row_start, self._next_position)
        else:
            source = index + _of_head(self._row_start, counts, total)
            self._pick(source, indptr, counts, total, self.reserve, self._next_position)

    def _pick(
        self,
        source: Tensor,
        indptr: Tensor,
        counts: Tensor,
        total: int,
        room: int,
        next_position: Tensor | None = None,
    ) -> None:
        """New buffers of the old slots `source` ``[total]``, head after head, with `room` behind each.

        One buffer at a time, so that no more than one old one is held beside its copy.
        """
        row_start, slots = _starts(counts, room), total + counts.numel() * room
        source = source.int()
        for name in list(self.tensors):
            (picked,) = gather_ragged([getattr(self, name)[None, None]], source, indptr, row_start, total=slots)
            setattr(self, name, picked)
        self._locate(counts, total, room, row_start, next_position)

    def _pick_heads(self, counts: Tensor, row_start: Tensor, total: int, room: int) -> None:
        """New buffers of whole heads ``[batch, heads]`` of `counts` entries from the old slots `row_start` on."""
        indptr = torch.nn.functional.pad(counts.reshape(-1).cumsum(0, dtype=torch.int32), (1, 0))
        slots = torch.arange(total, device=counts.device)
        source = slots + _of_head(row_start.reshape(-1) - indptr[:-1], counts, total)
        self._pick(source, indptr, counts, total, room)

    def _source(self) -> Tensor:
        """Slots of all entries ``[batch * heads, max_length]``, -1 behind each head's last one."""
        self._on_host()  # the exact width
        column = torch.arange(self.max_length, device=self.keys.device)
        return torch.where(column < self.row_lengths[:, None], self._row_start[:, None] + column, -1)

    def _repack(self, room: int) -> None:
        self._pick_heads(self._row_length.view(self._batch, self._heads), self._row_start, self.total, room)

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens of every row (rejected drafts)."""
        shortest = min((n for row in self.head_lengths for n in row), default=0)
        if tokens > shortest:
            raise ValueError(
                f"RaggedStore.crop: tokens must be at most the shortest head's {shortest} entries, got {tokens}"
            )
        self._grown = [n - tokens for n in self._grown]
        self.seen = [n - tokens for n in self.seen]
        self._room += tokens
        self._counters.sub_(tokens)

    # --- the batch

    def select_rows(self, rows: Tensor, picked: list[int] | None = None) -> None:
        """Row i becomes the old row ``rows[i]`` (beam search, repeats, sub-batches). `picked` is the same on the host."""
        picked = rows.tolist() if picked is None else picked
        if picked == list(range(self.batch)):
            return
        held = self.head_lengths
        counts, row_start = (t.view(self._batch, self._heads) for t in (self._row_length, self._row_start))
        rows = rows.to(counts.device)
        self.seen = [self.seen[i] for i in picked]
        self.targets = None if self.targets is None else [self.targets[i] for i in picked]
        self.extra = {name: t.index_select(0, rows.to(t.device)) for name, t in self.extra.items()}
        total = sum(sum(held[i]) for i in picked)
        self._pick_heads(counts.index_select(0, rows), row_start.index_select(0, rows), total, self._room)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> None:
        self._on_host()  # a copy that nothing waits for is not there to be read
        for name, tensor in self.tensors.items():
            setattr(self, name, tensor.to(device, non_blocking=non_blocking))
        self.extra = {name: t.to(device, non_blocking=non_blocking) for name, t in self.extra.items()}
        self._row_start = self._row_start.to(device, non_blocking=non_blocking)
        self._count(self._counters.to(device, non_blocking=non_blocking))

    # --- all heads side by side

    def _padded(self, t: Tensor) -> Tensor:
        """Packed ``[total, ...]`` as ``[batch, heads, max_length, ...]``, zeros behind each head's entries."""
        source = self._source().int()[None, None]
        return gather([t[None, None]], source.view(1, 1, -1))[0].view(self.batch, self.heads, -1, *t.shape[1:])

    def padded_positions(self) -> Tensor:
        """Positions as ``[batch, heads, max_length]`` int32, -1 behind a head's entries."""
        held = self._source().view(self.batch, self.heads, -1) >= 0
        return torch.where(held, self._padded(self.positions), -1)

    def prompt(self) -> tuple[Tensor, Tensor]:
        """K and V of a complete store as a left-padded prompt, copied: all heads of a row hold the same positions."""
        keys, values = self._padded(self.keys), self._padded(self.values)
        longest = keys.shape[2]
        for row, n in enumerate(self.seen):
            if n < longest:
                keys[row], values[row] = keys[row].roll(longest - n, 1), values[row].roll(longest - n, 1)
        return keys, values

    # --- saving

    def state_dict(self) -> dict[str, Tensor]:
        """The stored entries without room, head after head, and the counters."""
        slots = self._source()
        slots = slots[slots >= 0]
        state = {name: t[slots] for name, t in self.tensors.items()}
        state |= {"head_lengths": torch.tensor(self.head_lengths), "seen": torch.tensor(self.seen)}
        if self.targets is not None:
            state["targets"] = torch.tensor(self.targets)
        return {**state, **{f"extra.{name}": t.contiguous() for name, t in self.extra.items()}}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], *, reserve: int = 128) -> RaggedStore:
        counts = state["head_lengths"].to(state["keys"].device, torch.int32)
        store = cls(
            state["keys"],
            state["values"],
            state["positions"],
            counts,
            total=state["keys"].shape[0],
            seen=state["seen"].tolist(),
            scores=state.get("scores"),
            targets=state["targets"].tolist() if "targets" in state else None,
            reserve=reserve,
            room=0,
        )
        store.extra = {name.removeprefix("extra."): t for name, t in state.items() if name.startswith("extra.")}
        store._repack(reserve)
        return store


def _starts(counts: Tensor, room: int) -> Tensor:
    """First slot of each head ``[batch * heads]`` int64, `room` free slots behind each."""
    stretch = counts.reshape(-1).long() + room
    return stretch.cumsum(0) - stretch


def _of_head(t: Tensor, counts: Tensor, total: int) -> Tensor:
    """``t[r]`` of the head r that each packed entry belongs to, ``[total]``; the host knows how many they are."""
    return t.repeat_interleave(counts.reshape(-1), output_size=total)


def _is_supported(q: Tensor) -> bool:
    """Whether `ragged_decode_attention` takes the query: its dtypes and head dims, and no gradient."""
    dim = q.shape[3]
    fits = dim % 8 == 0 and 0 < dim <= 256 and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return fits and not (torch.is_grad_enabled() and q.requires_grad)
