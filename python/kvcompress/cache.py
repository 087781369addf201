"""Stores: what a layer keeps, how it grows, attends, shrinks, moves and is saved. No model, no method is known here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from kvcompress.attend import attend
from kvcompress.store import append_, compact_, gather

__all__ = ["DenseStore", "Store", "load_store", "register_store"]

_BESIDE = "beside."
_GROWTH = 8  # a full buffer grows by an eighth, at least by `reserve`: amortised O(1) copies a token


class Store(Protocol):
    """What a layer asks of any store, so that it never asks for its type.

    Rows are the sequences of the batch. Every stored entry knows its position; entries of a row and head ascend in it, and the
    last ones are the last tokens, which `append` writes and `crop` takes back.

    Attributes:
        kind: its name in saved files, see `register_store`.
        keys, values: the buffers, in the store's own layout.
        scores: what a later cut ranks by, in the layout of the keys; None where nothing needs it.
        seen: real tokens that each row has been given, so the position of its next token.
        targets: the budget of each row, mean entries a head; None: no budget.
        extra: further tensors ``[batch, ...]`` that some stage keeps beside the entries.
    """

    kind: ClassVar[str]
    keys: Tensor
    values: Tensor
    scores: Tensor | None
    seen: list[int]
    targets: list[int] | None
    extra: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffers of the entries by name."""
        ...

    @property
    def batch(self) -> int: ...

    @property
    def lengths(self) -> list[int]:
        """Entries a head of each row, on the host: the mean, rounded up, where heads differ."""
        ...

    @property
    def head_lengths(self) -> list[list[int]]:
        """Entries of each row and head, on the host."""
        ...

    @property
    def max_length(self) -> int:
        """Entries of the longest row or head."""
        ...

    @property
    def is_complete(self) -> bool:
        """Nothing was ever dropped."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room included: what the allocator holds for this layer."""
        ...

    @property
    def entry_nbytes(self) -> int:
        """Bytes of one entry of one head: K, V, position, and what else is kept of it."""
        ...

    def view(self) -> tuple[Tensor, Tensor]:
        """K and V as they lie, not copied, without room where the layout allows that."""
        ...

    def padded_positions(self) -> Tensor:
        """Positions of all entries, ``[batch, heads, max_length]`` int32, -1 behind a head's last one."""
        ...

    def prompt(self) -> tuple[Tensor, Tensor]:
        """K and V of a complete store as a left-padded prompt, ``[batch, heads, max_length, head_dim]``."""
        ...

    def append(self, keys: Tensor, values: Tensor, real: Sequence[int] | None = None) -> None:
        """Writes new tokens ``[batch, num_kv_heads, n, head_dim]`` behind the entries; row b's are the last ``real[b]``."""
        ...

    def attend(self, q: Tensor, *, softmax_scale: float) -> Tensor:
        """Attention of the last tokens, which are stored already, over everything at or before them."""
        ...

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens of every row (rejected drafts)."""
        ...

    def select_rows(self, rows: Tensor, picked: list[int] | None = None) -> None:
        """Row i becomes the old row ``rows[i]``; `picked` is the same on the host, where the caller has it."""
        ...

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> None:
        """Moves all tensors."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The entries without room, and the counters, as `load_store` takes them back."""
        ...


class _Loadable(Protocol):
    kind: ClassVar[str]

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], *, reserve: int = 128) -> Store: ...


_KINDS: dict[str, type[_Loadable]] = {}
S = TypeVar("S", bound=type[_Loadable])


def register_store(cls: S) -> S:
    """Makes `load_store` know a store by its `kind`."""
    _KINDS[cls.kind] = cls
    return cls


def load_store(kind: str, state: dict[str, Tensor], *, reserve: int = 128) -> Store:
    """The store of that kind whose `state_dict` this is."""
    if kind not in _KINDS:
        raise ValueError(f"load_store: kind must be one of {', '.join(sorted(_KINDS))}, got {kind}")
    return _KINDS[kind].from_state_dict(state, reserve=reserve)


@register_store
class DenseStore:
    """One layer's entries in contiguous buffers with room to append: K, V, positions, and scores if they are needed again.

    Row b's entries are slots ``[0, lengths[b])`` of every head, in ascending order of position; what lies behind is room,
    always finite. New tokens are written in place; no step copies the cache.

    Attributes:
        keys, values: ``[batch, heads, capacity, head_dim]``.
        positions: ``[batch, heads, capacity]`` int32, the RoPE position of each entry in its own row (padding not counted).
        scores: ``[batch, heads, capacity]`` float32 as the score stage gave them, or None. Entries appended later rank
            above all (+inf).
        lengths: stored entries of each row, on the host.
        seen: real tokens that each row has been given, so the position of its next token.
        targets: the budget of each row, which may exceed its length; None: no budget.
        extra: further tensors ``[batch, ...]`` that some stage keeps.
        beside: further tensors ``[batch, heads, capacity, ...]`` float32: numbers of each entry, which move with it.
    """

    kind: ClassVar[str] = "dense"

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        *,
        seen: Sequence[int] | None = None,
        scores: Tensor | None = None,
        targets: Sequence[int] | None = None,
        reserve: int = 128,
    ) -> None:
        self.keys, self.values, self.positions, self.scores = keys, values, positions, scores
        self.extra: dict[str, Tensor] = {}
        self.beside: dict[str, Tensor] = {}
        self._fills: dict[str, float] = {}
        self.targets = None if targets is None else list(targets)
        self.lengths = list(lengths)
        self.seen = list(self.lengths if seen is None else seen)
        self.reserve = reserve
        self._device_lengths: Tensor | None = None

    @classmethod
    def from_prefill(
        cls, keys: Tensor, values: Tensor, lengths: Sequence[int], *, reserve: int = 128, heads: int | None = None
    ) -> DenseStore:
        """Stores a whole prompt. Row b's real tokens are the last ``lengths[b]`` of `keys` and `values` (left padding)."""
        batch, _, seq_len, _ = keys.shape
        index = torch.arange(seq_len, dtype=torch.int32, device=keys.device)
        index = index.expand(batch, heads or keys.shape[1], seq_len)
        if min(lengths, default=seq_len) < seq_len:
            real = torch.tensor(lengths, dtype=torch.int32, device=keys.device)[:, None, None]
            index = torch.where(index < real, index + (seq_len - real), -1)
        return cls.gathered(keys, values, index.contiguous(), lengths, lengths, reserve=reserve)

    @classmethod
    def gathered(
        cls,
        keys: Tensor,
        values: Tensor,
        index: Tensor,
        counts: Sequence[int],
        lengths: Sequence[int],
        *,
        scores: Tensor | None = None,
        reserve: int = 128,
    ) -> DenseStore:
        """A new store of the rows `index` of a prompt's K and V; the prompt's tensors can be freed afterwards.

        Args:
            keys, values: ``[batch, num_kv_heads, seq_len, head_dim]``.
            index: ``[batch, heads, k]`` int32, ascending, -1 behind row b's ``counts[b]`` entries. More heads than the
                keys have (a multiple) means storage per query head.
            counts: kept entries of each row.
            lengths: real tokens of each row.
            scores: ``[batch, heads, seq_len]`` float32 to keep for a later cut.
            reserve: free slots behind the kept ones, and the least growth later.
        """
        seq_len = keys.shape[2]
        capacity = index.shape[2] + reserve
        tensors = [keys, values] if scores is None else [keys, values, scores]
        kept = gather(tensors, index, capacity=capacity)
        start = torch.tensor([seq_len - n for n in lengths], dtype=torch.int32, device=keys.device)
        positions = torch.full(kept[0].shape[:3], -1, dtype=torch.int32, device=keys.device)
        positions[:, :, : index.shape[2]] = torch.where(index >= 0, index - start[:, None, None], -1)
        kept_scores = None if scores is None else kept[2]
        return cls(kept[0], kept[1], positions, counts, seen=lengths, scores=kept_scores, reserve=reserve)

    # --- what is there

    @property
    def batch(self) -> int:
        return self.keys.shape[0]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @property
    def head_lengths(self) -> list[list[int]]:
        """`lengths` once for every head."""
        return [[n] * self.keys.shape[1] for n in self.lengths]

    @property
    def is_complete(self) -> bool:
        """Nothing was ever dropped."""
        return self.lengths == self.seen

    @property
    def is_uniform(self) -> bool:
        """All rows hold the same number of entries, so no mask is needed."""
        return min(self.lengths, default=0) == self.max_length

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {"keys": self.keys, "values": self.values, "positions": self.positions}
        if self.scores is not None:
            held["scores"] = self.scores
        return {**held, **{_BESIDE + name: t for name, t in self.beside.items()}}

    def _assign(self, name: str, tensor: Tensor) -> None:
        """Replaces one of `tensors`."""
        if name.startswith(_BESIDE):
            self.beside[name.removeprefix(_BESIDE)] = tensor
        else:
            setattr(self, name, tensor)

    def put_beside(self, name: str, tensor: Tensor, *, fill: float) -> None:
        """Keeps numbers ``[batch, heads, capacity, ...]`` float32 beside the entries; those of entries to come are `fill`."""
        self.beside[name], self._fills[name] = tensor, fill

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, room included: what the allocator holds for this layer."""
        held = [*self.tensors.values(), *self.extra.values()]
        if self._device_lengths is not None:
            held.append(self._device_lengths)
        return sum(t.untyped_storage().nbytes() for t in held)

    @property
    def entry_nbytes(self) -> int:
        """Bytes of one entry of one head: K, V, position, and what else is kept of it."""
        return sum(t[:1, :1, :1].nbytes for t in self.tensors.values())

    @property
    def device_lengths(self) -> Tensor:
        """`lengths` as ``[batch]`` int32 on the device."""
        if self._device_lengths is None:
            self._device_lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.keys.device)
        return self._device_lengths

    def view(self) -> tuple[Tensor, Tensor]:
        """K and V up to the longest row: ``[batch, heads, max_length, head_dim]``, not copied."""
        return self.keys[:, :, : self.max_length], self.values[:, :, : self.max_length]

    def padded_positions(self) -> Tensor:
        """Positions as ``[batch, heads, max_length]`` int32, -1 behind a row's last entry."""
        slots = torch.arange(self.max_length, device=self.keys.device)
        held = slots < self.device_lengths[:, None, None]
        return torch.where(held, self.positions[:, :, : self.max_length], -1)

    def prompt(self) -> tuple[Tensor, Tensor]:
        """K and V as of a left-padded prompt; copied only where rows differ in length."""
        keys, values = self.view()
        return (keys, values) if self.is_uniform else (self._right_aligned(keys), self._right_aligned(values))

    def _right_aligned(self, t: Tensor) -> Tensor:
        out = torch.zeros_like(t)
        for row, n in enumerate(self.lengths):
            out[row, :, t.shape[2] - n :] = t[row, :, :n]
        return out

    def attend(self, q: Tensor, *, softmax_scale: float) -> Tensor:
        """Attention of the last tokens over their own rows. See `kvcompress.attend.attend`."""
        keys, values = self.view()
        ragged = None if self.is_uniform else self.device_lengths
        return attend(q, keys, values, softmax_scale=softmax_scale, ends=self.lengths, device_ends=ragged)

    # --- growing

    def append(self, keys: Tensor, values: Tensor, real: Sequence[int] | None = None) -> None:
        """Writes new tokens behind each row's entries, in place.

        Args:
            keys, values: ``[batch, num_kv_heads, n, head_dim]``; repeated to the stored heads if those are query heads.
            real: how many of the n belong to row b, the last ones (left padding); None: all.
        """
        new = keys.shape[2]
        added = [new] * self.batch if real is None else list(real)
        repeats = self.keys.shape[1] // keys.shape[1]
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        self._make_room(max((n + a for n, a in zip(self.lengths, added)), default=0))
        if self.is_uniform and min(added, default=new) == new:
            span = slice(self.max_length, self.max_length + new)
            self.keys[:, :, span] = keys
            self.values[:, :, span] = values
            first = self.seen[0] if self.seen else 0
            if new == 1 and len(set(self.seen)) <= 1:
                self.positions[:, :, span].fill_(first)  # the decode step: no tensor is made for it
            elif len(set(self.seen)) <= 1:
                steps = torch.arange(first, first + new, dtype=torch.int32, device=keys.device)
                self.positions[:, :, span] = steps
            else:
                steps = torch.arange(new, dtype=torch.int32, device=keys.device)
                seen = torch.tensor(self.seen, dtype=torch.int32, device=keys.device)
                self.positions[:, :, span] = (seen[:, None] + steps)[:, None]
            if self.scores is not None:
                self.scores[:, :, span] = torch.inf
            for name, tensor in self.beside.items():
                tensor[:, :, span] = self._fills[name]
        else:
            steps = torch.arange(new, dtype=torch.int32, device=keys.device)
            skipped = torch.tensor([new - a for a in added], dtype=torch.int32, device=keys.device)[:, None]
            seen = torch.tensor(self.seen, dtype=torch.int32, device=keys.device)[:, None]
            order = steps - skipped  # [batch, n]: -1 and below are padding
            slots = torch.where(order >= 0, self.device_lengths[:, None] + order, -1)
            heads = self.keys.shape[1]
            rows = [keys, values, (seen + order)[:, None].expand(-1, heads, -1).contiguous()]
            buffers = [self.keys, self.values, self.positions]
            if self.scores is not None:
                rows.append(torch.full_like(rows[2], torch.inf, dtype=torch.float32))
                buffers.append(self.scores)
            for name, tensor in self.beside.items():
                rows.append(tensor.new_full((*tensor.shape[:2], new, *tensor.shape[3:]), self._fills[name]))
                buffers.append(tensor)
            append_(buffers, rows, slots)
        self.lengths = [n + a for n, a in zip(self.lengths, added)]
        self.seen = [n + a for n, a in zip(self.seen, added)]
        if len(set(added)) > 1:
            self._device_lengths = None
        elif self._device_lengths is not None:
            self._device_lengths = self._device_lengths + added[0]

    def _make_room(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        capacity = max(needed, self.capacity + max(self.reserve, self.capacity // _GROWTH))
        for name, old in self.tensors.items():
            wide = old.new_zeros((*old.shape[:2], capacity, *old.shape[3:]))
            wide[:, :, : self.max_length] = old[:, :, : self.max_length]
            self._assign(name, wide)

    # --- shrinking

    def keep(self, index: Tensor, counts: Sequence[int]) -> None:
        """Keeps the entries ``index`` ``[batch, heads, k]`` (ascending, -1 behind ``counts[b]``) and drops all others.

        In place where the freed tail is wanted as room; into smaller buffers where that gives memory back.
        """
        k = index.shape[2]
        held = self.tensors
        if self.capacity <= k + 2 * self.reserve:
            compact_(list(held.values()), index)
        else:
            smaller = gather(list(held.values()), index, capacity=k + self.reserve)
            for name, tensor in zip(held, smaller):
                self._assign(name, tensor)
        self._set_lengths(counts)

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens of every row (rejected drafts)."""
        if tokens > min(self.lengths, default=0):
            raise ValueError(f"DenseStore.crop: tokens must be at most the stored entries {self.lengths}, got {tokens}")
        self._set_lengths([n - tokens for n in self.lengths])
        self.seen = [n - tokens for n in self.seen]

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._device_lengths = None

    # --- the batch

    def select_rows(self, rows: Tensor, picked: list[int] | None = None) -> None:
        """Row i becomes the old row ``rows[i]`` (beam search, repeats, sub-batches).

        `picked` is the same on the host, where the caller has it (one device read for all layers).
        """
        picked = rows.tolist() if picked is None else picked
        if picked == list(range(self.batch)):
            return
        for name, tensor in self.tensors.items():
            self._assign(name, tensor.index_select(0, rows.to(tensor.device)))
        self.extra = {name: t.index_select(0, rows.to(t.device)) for name, t in self.extra.items()}
        self.seen = [self.seen[i] for i in picked]
        self.targets = None if self.targets is None else [self.targets[i] for i in picked]
        self._set_lengths([self.lengths[i] for i in picked])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> None:
        for name, tensor in self.tensors.items():
            self._assign(name, tensor.to(device, non_blocking=non_blocking))
        self.extra = {name: t.to(device, non_blocking=non_blocking) for name, t in self.extra.items()}
        self._device_lengths = None

    # --- saving

    def state_dict(self) -> dict[str, Tensor]:
        """The stored entries without the room behind them, and the row counters."""
        entries = {name: t[:, :, : self.max_length].contiguous() for name, t in self.tensors.items()}
        state = {**entries, "lengths": torch.tensor(self.lengths), "seen": torch.tensor(self.seen)}
        if self.targets is not None:
            state["targets"] = torch.tensor(self.targets)
        state |= {f"fill.{name}": torch.tensor(fill) for name, fill in self._fills.items()}
        return {**state, **{f"extra.{name}": t.contiguous() for name, t in self.extra.items()}}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], *, reserve: int = 128) -> DenseStore:
        store = cls(
            state["keys"],
            state["values"],
            state["positions"],
            state["lengths"].tolist(),
            seen=state["seen"].tolist(),
            scores=state.get("scores"),
            targets=state["targets"].tolist() if "targets" in state else None,
            reserve=reserve,
        )
        prefix = "extra."
        store.extra = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
        for name, t in state.items():
            if name.startswith(_BESIDE):
                own = name.removeprefix(_BESIDE)
                store.put_beside(own, t, fill=float(state[f"fill.{own}"]))
        store._make_room(store.max_length + reserve)
        return store
