"""RaggedStore: a layer whose heads keep different numbers of entries, in memory that is really theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.decode import ragged_decode_attention
from kvcompress.store import append_, gather, gather_ragged

__all__ = ["RaggedStore"]

_QUERIES = 8  # what one call of ragged_decode_attention takes


class RaggedStore:
    """One layer's entries with a length of its own for every row and head: packed buffers with room behind each head.

    Head h of row b owns the slots ``[start, start + capacity)`` of the packed buffers, its entries are the first
    ``head_lengths[b][h]`` of them, in ascending order of position; the room behind is finite and for tokens to come, so no
    step copies the cache. A full room is renewed for all heads at once.

    Attributes:
        keys, values: ``[total, head_dim]``.
        positions: ``[total]`` int32.
        scores: ``[total]`` float32 as the score stage gave them (later entries +inf), or None.
        head_lengths: stored entries of each row and head, on the host.
        seen: real tokens that each row has been given.
        targets: the budget of each row: mean entries a head; None: no budget.
        extra: further tensors ``[batch, ...]`` that some stage keeps beside the entries.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        head_lengths: Sequence[Sequence[int]],
        *,
        seen: Sequence[int],
        scores: Tensor | None = None,
        targets: Sequence[int] | None = None,
        reserve: int = 128,
    ) -> None:
        self.keys, self.values, self.positions, self.scores = keys, values, positions, scores
        self.head_lengths = [list(row) for row in head_lengths]
        self.seen = list(seen)
        self.targets = None if targets is None else list(targets)
        self.reserve = reserve
        self.extra: dict[str, Tensor] = {}
        self._room = reserve  # free slots behind every head
        self._locate()

    @classmethod
    def gathered(
        cls,
        keys: Tensor,
        values: Tensor,
        index: Tensor,
        head_lengths: Sequence[Sequence[int]],
        lengths: Sequence[int],
        *,
        scores: Tensor | None = None,
        reserve: int = 128,
    ) -> RaggedStore:
        """A new store of the rows `index` of a prompt's K and V; the prompt's tensors can be freed afterwards.

        Args:
            keys, values: ``[batch, num_kv_heads, seq_len, head_dim]``.
            index: ``[batch, heads, k]`` int32, ascending, -1 behind each head's own count.
            head_lengths: those counts, ``[batch][heads]`` on the host.
            lengths: real tokens of each row.
            scores: ``[batch, heads, seq_len]`` float32 to keep for a later cut.
            reserve: free slots behind each head.
        """
        seq_len, device = keys.shape[2], keys.device
        starts, total = _stretches(head_lengths, reserve)
        first = torch.tensor([seq_len - n for n in lengths], dtype=torch.int32, device=device)
        slots = torch.arange(seq_len, dtype=torch.int32, device=device)
        positions = (slots - first[:, None])[:, None].expand(-1, index.shape[1], -1)
        tensors = [keys, values, positions] if scores is None else [keys, values, positions, scores]
        row_start = torch.tensor(starts, dtype=torch.int64, device=device)
        kept = gather_ragged(tensors, index, row_start, total=total)
        return cls(
            kept[0],
            kept[1],
            kept[2],
            head_lengths,
            seen=lengths,
            scores=None if scores is None else kept[3],
            reserve=reserve,
        )

    def _locate(self) -> None:
        """Where each head starts and how long it is, on the device."""
        starts, _ = _stretches(self.head_lengths, self._room)
        flat = [n for row in self.head_lengths for n in row]
        self._row_start = torch.tensor(starts, dtype=torch.int64, device=self.keys.device)
        self._row_length = torch.tensor(flat, dtype=torch.int32, device=self.keys.device)

    # --- what is there

    @property
    def batch(self) -> int:
        return len(self.head_lengths)

    @property
    def heads(self) -> int:
        return len(self.head_lengths[0]) if self.head_lengths else 0

    @property
    def lengths(self) -> list[int]:
        """Mean entries a head of each row, rounded up."""
        return [-(-sum(row) // max(len(row), 1)) for row in self.head_lengths]

    @property
    def max_length(self) -> int:
        return max((n for row in self.head_lengths for n in row), default=0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {"keys": self.keys, "values": self.values, "positions": self.positions}
        return held if self.scores is None else {**held, "scores": self.scores}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room included: what the allocator holds for this layer."""
        held = [*self.tensors.values(), *self.extra.values(), self._row_start, self._row_length]
        return sum(t.untyped_storage().nbytes() for t in held)

    def attend(self, q: Tensor, *, softmax_scale: float) -> Tensor:
        """Attention of the last tokens over their own rows and heads. See `kvcompress.ragged_decode_attention`."""
        new, parts = q.shape[2], []
        for first in range(0, new, _QUERIES):
            last = min(first + _QUERIES, new)
            lengths = self._row_length - (new - last)  # later tokens are stored already, but not visible yet
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

    # --- growing

    def append(self, keys: Tensor, values: Tensor, real: Sequence[int] | None = None) -> None:
        """Writes new tokens behind each head's entries, in place. Arguments as `DenseStore.append`."""
        batch, heads, new, dim = keys.shape
        added = [new] * batch if real is None else list(real)
        grown = [[n + a for n in row] for row, a in zip(self.head_lengths, added)]
        if max(added, default=0) > self._room:
            self._repack(room=max(self.reserve, max(added)))
        steps = torch.arange(new, dtype=torch.int32, device=keys.device)
        order = steps.expand(batch, new)
        if min(added, default=new) < new:
            skipped = torch.tensor([new - a for a in added], dtype=torch.int32, device=keys.device)
            order = order - skipped[:, None]  # -1 and below are padding
        ends = (self._row_start + self._row_length).view(batch, heads, 1)
        slots = torch.where(order[:, None] >= 0, ends + order[:, None], -1).int()
        seen = torch.tensor(self.seen, dtype=torch.int32, device=keys.device)
        positions = (seen[:, None] + order)[:, None].expand(batch, heads, new).contiguous()
        rows = [keys.reshape(1, 1, -1, dim), values.reshape(1, 1, -1, dim), positions.reshape(1, 1, -1)]
        buffers = [self.keys[None, None], self.values[None, None], self.positions[None, None]]
        if self.scores is not None:
            rows.append(torch.full((1, 1, batch * heads * new), torch.inf, device=keys.device))
            buffers.append(self.scores[None, None])
        append_(buffers, rows, slots.view(1, -1))
        self._room -= max(added, default=0)
        self.head_lengths = grown
        self.seen = [n + a for n, a in zip(self.seen, added)]
        grow = torch.tensor(added, dtype=torch.int32, device=keys.device)
        self._row_length = self._row_length + grow.repeat_interleave(heads)

    def _pick(self, source: Tensor, head_lengths: Sequence[Sequence[int]], room: int) -> None:
        """New buffers from packed rows of the old ones: `source` holds absolute slots, heads one after the other."""
        total = source.shape[0]
        flat = torch.tensor([n for row in head_lengths for n in row], dtype=torch.int64, device=source.device)
        head = torch.repeat_interleave(torch.arange(len(flat), device=source.device), flat, output_size=total)
        index = torch.full((total + len(flat) * room,), -1, dtype=torch.int32, device=source.device)
        index[torch.arange(total, device=source.device) + head * room] = source.int()
        picked = gather([t[None, None] for t in self.tensors.values()], index[None, None])
        for name, tensor in zip(self.tensors, picked):
            setattr(self, name, tensor[0, 0])
        self.head_lengths = [list(row) for row in head_lengths]
        self._room = room
        self._locate()

    def _slots(self) -> Tensor:
        """Absolute slots of all entries, heads one after the other."""
        total = sum(n for row in self.head_lengths for n in row)
        lengths = self._row_length.long()
        before = torch.cumsum(lengths, 0) - lengths
        shift = torch.repeat_interleave(self._row_start - before, lengths, output_size=total)
        return torch.arange(total, device=self.keys.device) + shift

    def _repack(self, room: int) -> None:
        self._pick(self._slots(), self.head_lengths, room)

    # --- shrinking

    def keep(self, index: Tensor, head_lengths: Sequence[Sequence[int]]) -> None:
        """Keeps the entries `index` ``[batch, heads, k]`` of each head (as in `gathered`), giving the bytes of all others back."""
        kept = index.flatten(0, 1)
        rows, columns = torch.nonzero(kept >= 0, as_tuple=True)
        self._pick(self._row_start[rows] + kept[rows, columns], head_lengths, self.reserve)

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens of every row (rejected drafts)."""
        shortest = min((n for row in self.head_lengths for n in row), default=0)
        if tokens > shortest:
            raise ValueError(
                f"RaggedStore.crop: tokens must be at most the shortest head's {shortest} entries, got {tokens}"
            )
        self.head_lengths = [[n - tokens for n in row] for row in self.head_lengths]
        self.seen = [n - tokens for n in self.seen]
        self._room += tokens
        self._row_length = self._row_length - tokens

    # --- the batch

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row ``rows[i]`` (beam search, repeats, sub-batches)."""
        picked = rows.tolist()
        slots = self._slots()
        counts = [sum(row) for row in self.head_lengths]
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        source = torch.cat([slots[bounds[i] : bounds[i + 1]] for i in picked]) if picked else slots[:0]
        self._pick(source, [self.head_lengths[i] for i in picked], self._room)
        self.extra = {name: t.index_select(0, rows.to(t.device)) for name, t in self.extra.items()}
        self.seen = [self.seen[i] for i in picked]
        self.targets = None if self.targets is None else [self.targets[i] for i in picked]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> None:
        for name, tensor in self.tensors.items():
            setattr(self, name, tensor.to(device, non_blocking=non_blocking))
        self.extra = {name: t.to(device, non_blocking=non_blocking) for name, t in self.extra.items()}
        self._row_start = self._row_start.to(device, non_blocking=non_blocking)
        self._row_length = self._row_length.to(device, non_blocking=non_blocking)

    def padded_positions(self) -> Tensor:
        """Positions as ``[batch, heads, max_length]`` int32, -1 behind a head's entries."""
        out = torch.full((self.batch, self.heads, self.max_length), -1, dtype=torch.int32, device=self.keys.device)
        inside = torch.arange(self.max_length, device=self.keys.device) < self._row_length.view(
            self.batch, self.heads, 1
        )
        out[inside] = self.positions[self._slots()]
        return out

    # --- saving

    def state_dict(self) -> dict[str, Tensor]:
        """The stored entries without room, and the counters."""
        slots = self._slots()
        state = {name: t[slots] for name, t in self.tensors.items()}
        state |= {"head_lengths": torch.tensor(self.head_lengths), "seen": torch.tensor(self.seen)}
        if self.targets is not None:
            state["targets"] = torch.tensor(self.targets)
        return {**state, **{f"extra.{name}": t.contiguous() for name, t in self.extra.items()}}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], *, reserve: int = 128) -> RaggedStore:
        store = cls(
            state["keys"],
            state["values"],
            state["positions"],
            state["head_lengths"].tolist(),
            seen=state["seen"].tolist(),
            scores=state.get("scores"),
            targets=state["targets"].tolist() if "targets" in state else None,
            reserve=0,
        )
        store.extra = {name.removeprefix("extra."): t for name, t in state.items() if name.startswith("extra.")}
        store.reserve = reserve
        store._repack(reserve)
        return store


def _stretches(head_lengths: Sequence[Sequence[int]], room: int) -> tuple[list[int], int]:
    """First slot of each head, `room` free slots behind each, and the slots in all."""
    starts, start = [], 0
    for row in head_lengths:
        for n in row:
            starts.append(start)
            start += n + room
    return starts, start
