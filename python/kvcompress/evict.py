"""Stores of fixed room: a new entry takes the slot of the one that matters least. Nothing shifts, nothing waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, library

from kvcompress import _check
from kvcompress.store import _check_row_list

__all__ = ["evict_append_", "history_scores", "ragged_evict_append_"]

_MAX_NEW = 8
_MAX_WIDTH = 1024
_FUSE = {"sum": 0, "max": 1}


def evict_append_(
    buffers: Sequence[Tensor],
    rows: Sequence[Tensor],
    positions: Tensor,
    lengths: Tensor,
    seen: Tensor,
    *,
    scores: Tensor | None = None,
    history: Tensor | None = None,
    limits: Tensor | None = None,
    sinks: Tensor | None = None,
    inv_freq: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    fresh: float = 0.0,
    fuse: Literal["sum", "max"] | None = None,
) -> Tensor:
    """Writes new entries into a store of fixed room; once it is full, each overwrites the entry that matters least.

    A unit is what shares one victim: a kv head, or all heads of a layer (``units = 1``). For its t-th new entry:

    - ``lengths < limit``: the slot is ``lengths``, and lengths grows by one: the plain append at a length on the device.
    - else the slot is that of the stored entry with the lowest score, among those with ``sink <= position < seen + t -
      window``: outside the first `sink` tokens and the newest `window` ones, whatever slots these lie in. Scores are added
      up over the unit's heads in their order. NaN is below every number; of equal scores the smaller position stays, as
      in `topk`. Without scores the smallest position leaves: a ring, as streaming and sliding windows need. With `fuse` the
      scores are ``history_scores(history, positions, lengths, seen, window=window, fuse=fuse)`` of the store before the call,
      without a launch of their own.

    Then ``buffers[slot] = rows[t]``, ``positions[slot] = seen + t``, ``scores[slot] = fresh``, ``history[slot] = -inf``, and at
    the end ``seen += n``. With `sinks`, at last ``buffers[0][i] = rerotate(sinks[i], seen - lengths, inv_freq)`` for the first
    slots: the first tokens move up by as many positions as entries have left behind them, always from where they began, so
    nothing drifts (`kvcompress.rotary.SinkRotation`). Entries written by one call never displace each other. If all entries are protected (a limit of
    ``sink + window`` or less) the lowest of these leaves all the same. Slots are in no order; attention does not mind.

    One launch, a block a unit, two row writes a head; lengths and counters are read and written on the device, so the
    op never waits, and a captured CUDA graph serves a store that fills up and then turns over.

    Args:
        buffers: one to eight of ``[batch, heads, capacity, head_dim]`` or ``[batch, heads, capacity]``: K, V and whatever else
            an entry has; changed in place. Any dtypes of 1, 2, 4 or 8 bytes, any strides with a contiguous last dimension;
            heads a multiple of units.
        rows: for each buffer the new entries, ``[batch, heads, n, head_dim]`` or ``[batch, heads, n]``, n from 1 to 8.
        positions: ``[batch, units, capacity]`` int32, which token each slot holds; changed in place.
        lengths: ``[batch, units]`` int32, entries stored; changed in place.
        seen: ``[batch, units]`` int32, tokens seen so far, which is the position of the next; changed in place.
        scores: ``[batch, score heads, capacity]`` float32, higher = keep, score heads a multiple of units; changed in place.
        history: ``[batch, heads, capacity, width]`` float32, what earlier queries thought of an entry; changed in place.
        limits: ``[batch, units]`` int32, room of each unit, at most the capacity; None: the capacity.
        sinks: ``[batch, heads, num_sinks, head_dim]``, float32, float16 or bfloat16 like buffers[0], whose first slots hold the
            first tokens: their keys as they were rotated first.
        inv_freq: ``[rotary_dim / 2]`` float32, the model's frequencies, with sinks; dimensions beyond 2 of each are left alone.
        sink: first tokens that never leave.
        window: newest stored tokens that do not leave; ``sink + window < capacity``.
        fresh: score of a new entry.
        fuse: ranks by history instead of scores, at a history's width from 1 to 1024.

    Returns:
        slots ``[batch, units, n]`` int32, where each new entry went; -1 where a call brings more tokens than its unit's limit
        and the token was not stored.

    Raises:
        ValueError, TypeError: ``evict_append_: argument must be ..., got ...``. Values of `lengths` are checked under
            `set_debug` only.

    Scratch: with fuse ``4 * batch * units * capacity`` bytes.

    Source: H2O's in-place form of its heavy hitters (FlexGen backend) does the same with two row moves a head; TOVA,
    arXiv 2401.06104, with one victim for all heads; StreamingLLM, arXiv 2309.17453, as a ring.

    Example:
        >>> keys, new = torch.zeros(1, 1, 3, 1), torch.ones(1, 1, 1, 1)
        >>> positions, lengths, seen = (torch.zeros(*shape, dtype=torch.int32) for shape in ((1, 1, 3), (1, 1), (1, 1)))
        >>> [kvcompress.evict_append_([keys], [new * t], positions, lengths, seen, sink=1).item() for t in range(6)]
        [0, 1, 2, 1, 2, 1]
        >>> keys.flatten().tolist(), positions.tolist()
        ([0.0, 5.0, 4.0], [[[0, 5, 4]]])
    """
    op = torch.ops.kvcompress.evict_append_.default
    code = 0 if fuse is None else 1 + _fuse_code("evict_append_", fuse)
    state = (positions, lengths, seen, scores, history, limits, sinks, inv_freq)
    return _check.call(op, buffers, rows, *state, sink, window, fresh, code)


def ragged_evict_append_(
    buffers: Sequence[Tensor],
    rows: Sequence[Tensor],
    positions: Tensor,
    row_start: Tensor,
    lengths: Tensor,
    seen: Tensor,
    limits: Tensor,
    *,
    max_length: int,
    scores: Tensor | None = None,
    history: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    fresh: float = 0.0,
    fuse: Literal["sum", "max"] | None = None,
) -> Tensor:
    """`evict_append_` over packed heads, each of which has a room of its own and drops entries of its own.

    Head h of row b owns the slots ``[row_start[s], row_start[s] + limits[s])`` of everything that lies in the store, ``s = b *
    heads + h``; its entries are the first ``lengths[s]`` of them. A head below its limit takes the next slot, a full one that of
    its lowest entry, by the same rules. One launch, a block a head, or with `fuse` a few; nothing is waited for.

    Args:
        buffers: one to eight of ``[slots, head_dim]`` or ``[slots]``, changed in place; dtypes and strides as in `evict_append_`.
        rows: for each buffer the new entries, ``[batch, heads, n, head_dim]`` or ``[batch, heads, n]``, n from 1 to 8.
        positions: ``[slots]`` int32, which token each slot holds; changed in place.
        row_start: ``[batch * heads]`` int64, the first slot of each head; heads must not overlap nor leave the buffers.
        lengths, seen: ``[batch * heads]`` int32, entries stored and tokens seen; changed in place.
        limits: ``[batch * heads]`` int32, room of each head; a head of no room keeps nothing.
        max_length: what no limit exceeds, known on the host.
        scores: ``[slots]`` float32, higher = keep; changed in place.
        history: ``[slots, width]`` float32; changed in place.
        sink, window, fresh, fuse: as in `evict_append_`; ``sink + window < max_length``. A head whose limit is no more than that
            drops the lowest of its protected entries.

    Returns:
        slots ``[batch, heads, n]`` int32, counted from each head's own first one; -1 where a token was not stored.

    Raises:
        ValueError, TypeError: ``ragged_evict_append_: argument must be ..., got ...``. Values of `lengths` and `limits` are
            checked under `set_debug` only; those of `row_start` are the caller's contract.

    Scratch: with fuse ``4 * batch * heads * max_length`` bytes.

    Example:
        >>> keys, new = torch.zeros(4, 1), torch.ones(1, 2, 1, 1)  # two heads of three slots and one
        >>> start, limits = torch.tensor([0, 3]), torch.tensor([3, 1], dtype=torch.int32)
        >>> positions, lengths, seen = (torch.zeros(n, dtype=torch.int32) for n in (4, 2, 2))
        >>> state = (positions, start, lengths, seen, limits)
        >>> [kvcompress.ragged_evict_append_([keys], [new * t], *state, max_length=3).tolist() for t in range(4)]
        [[[[0], [0]]], [[[1], [0]]], [[[2], [0]]], [[[0], [0]]]]
        >>> keys.flatten().tolist()
        [3.0, 1.0, 2.0, 3.0]
    """
    op = torch.ops.kvcompress.ragged_evict_append_.default
    code = 0 if fuse is None else 1 + _fuse_code("ragged_evict_append_", fuse)
    state = (positions, row_start, lengths, seen, limits, scores, history)
    return _check.call(op, buffers, rows, *state, max_length, sink, window, fresh, code)


def history_scores(
    history: Tensor,
    positions: Tensor,
    lengths: Tensor,
    seen: Tensor,
    *,
    window: int = 0,
    fuse: Literal["sum", "max"] = "sum",
) -> Tensor:
    """Scores of the entries of a store by what earlier queries, a column of logits each, thought of them.

    ``scores[j] = sum (or max) over w of softmax over candidates i of history[i, w], at j``. Candidates are the entries with
    ``position < seen - window``. A column of only -inf (a query that is not there yet) counts 0; slots that are no
    candidate get 0. In float32.

    Args:
        history: ``[batch, heads, capacity, width]`` float32, logits of the last `width` queries, entry by entry; any strides
            with a contiguous last dimension; width from 1 to 1024.
        positions: ``[batch, units, capacity]`` int32; units divides heads.
        lengths: ``[batch, units]`` int32, entries stored.
        seen: ``[batch, units]`` int32, tokens seen so far.
        window: newest tokens that take no part, since they stay anyway.
        fuse: over the queries.

    Returns:
        scores ``[batch, heads, capacity]`` float32.

    Raises:
        ValueError, TypeError: ``history_scores: argument must be ..., got ...``.

    Scratch: none.

    Source: MorphKV, arXiv 2503.00979 (`sum_fused`, `max_fused`). The official code runs this softmax in the model's dtype.

    Example:
        >>> history = torch.randn(1, 2, 10, 4)
        >>> positions = torch.arange(10, dtype=torch.int32).expand(1, 2, 10)
        >>> full = torch.full((1, 2), 10, dtype=torch.int32)
        >>> kvcompress.history_scores(history, positions, full, full, window=4)[0, 0].sum()  # four queries, one each
        tensor(4.)
    """
    code = _fuse_code("history_scores", fuse)
    return _check.call(torch.ops.kvcompress.history_scores.default, history, positions, lengths, seen, window, code)


def _fuse_code(op: str, fuse: str) -> int:
    code = _FUSE.get(fuse)
    if code is None:
        raise ValueError(f'{op}: fuse must be "sum" or "max", got "{fuse}"')
    return code


# --- fakes: shapes, and the checks of csrc/store/evict_append.cpp and csrc/score/history_scores.cpp in the same words and order


def _overlaps(t: Tensor, dims: int) -> bool:
    return any(t.shape[dim] > 1 and t.stride(dim) == 0 for dim in range(dims))


def _fits(t: Tensor, positions: Tensor) -> bool:
    """Of the batch and capacity of positions, and a multiple of its units in heads."""
    batch, units, capacity = positions.shape
    multiple = t.shape[1] == 0 if units == 0 else t.shape[1] >= units and t.shape[1] % units == 0
    return t.shape[0] == batch and t.shape[2] == capacity and multiple


def _must_fit(positions: Tensor) -> str:
    batch, units, capacity = positions.shape
    return f"of the batch ({batch}) and capacity ({capacity}) of positions and a multiple of {units} heads"


def _unit_counts(op: str, argument: str, t: Tensor, positions: Tensor, *, is_written: bool) -> None:
    batch, units = positions.shape[:2]
    ok = t.dim() == 2 and t.shape[0] == batch and t.shape[1] == units
    _check.require(ok, op, argument, f"[batch, units] [{batch}, {units}]", f"{t.dim()}D {_check.shape_string(t)}")
    _check.dtype(op, argument, t, torch.int32)
    _check.same_device(op, argument, t, positions, "positions")
    _check.require(not (is_written and _overlaps(t, 2)), op, argument, "free of overlaps", "a stride of 0")


def _entry_floats(op: str, argument: str, t: Tensor | None, positions: Tensor, rank: int, layout: str) -> None:
    if t is None:
        return
    _check.rank(op, argument, t, rank, layout)
    _check.dtype(op, argument, t, torch.float32)
    _check.same_device(op, argument, t, positions, "positions")
    _check.require(_fits(t, positions), op, argument, _must_fit(positions), _check.shape_string(t))
    _check.last_contiguous(op, argument, t)
    _check.require(not _overlaps(t, rank - 1), op, argument, "free of overlaps", "a stride of 0")


def _check_sinks(op: str, sinks: Tensor | None, inv_freq: Tensor | None, keys: Tensor) -> None:
    got = "none" if inv_freq is None else "no sinks"
    _check.require((sinks is None) == (inv_freq is None), op, "inv_freq", "there with sinks alone", got)
    if sinks is None or inv_freq is None:
        return
    _check.rank(op, "sinks", sinks, 4, "[batch, heads, num_sinks, head_dim]")
    _check.float_dtype(op, "sinks", sinks)
    _check.same_dtype(op, "sinks", sinks, keys, "buffers[0]")
    _check.same_device(op, "sinks", sinks, keys, "buffers[0]")
    must = f"of the shape of buffers[0] {_check.shape_string(keys)} but for fewer entries"
    same = keys.dim() == 4 and sinks.shape == (*keys.shape[:2], sinks.shape[2], keys.shape[3])
    _check.require(same and sinks.shape[2] <= keys.shape[2], op, "sinks", must, _check.shape_string(sinks))
    _check.last_contiguous(op, "sinks", sinks)
    _check.rank(op, "inv_freq", inv_freq, 1, "[rotary_dim / 2]")
    _check.dtype(op, "inv_freq", inv_freq, torch.float32)
    _check.same_device(op, "inv_freq", inv_freq, keys, "buffers[0]")
    _check.last_contiguous(op, "inv_freq", inv_freq)
    most = keys.shape[3] // 2
    got = _check.shape_string(inv_freq)
    _check.require(inv_freq.shape[0] <= most, op, "inv_freq", f"[at most {most}]", got)


def _check_eviction(
    op: str,
    n: int,
    sink: int,
    window: int,
    name: str,
    capacity: int,
    fuse: int,
    scores: Tensor | None,
    history: Tensor | None,
) -> None:
    must = f"from 1 to 8 and at most the {name} ({capacity})"
    _check.require(1 <= n <= min(_MAX_NEW, capacity), op, "n", must, n)
    _check.require(sink >= 0, op, "sink", "at least 0", sink)
    _check.require(window >= 0, op, "window", "at least 0", window)
    must = f"below the {name} less the sink ({capacity - sink})"
    _check.require(sink + window < capacity, op, "window", must, window)
    _check.require(fuse in (0, 1, 2), op, "fuse", "0 (none), 1 (sum) or 2 (max)", fuse)
    if fuse == 0:
        return
    _check.require(history is not None, op, "history", "there with fuse", "none")
    _check.require(scores is None, op, "scores", "absent with fuse", "scores")
    width = history.shape[-1] if history is not None else 0
    _check.require(1 <= width <= _MAX_WIDTH, op, "history", "of a width from 1 to 1024 with fuse", width)


@library.register_fake("kvcompress::evict_append_")
def _(
    buffers: Sequence[Tensor],
    rows: Sequence[Tensor],
    positions: Tensor,
    lengths: Tensor,
    seen: Tensor,
    scores: Tensor | None,
    history: Tensor | None,
    limits: Tensor | None,
    sinks: Tensor | None,
    inv_freq: Tensor | None,
    sink: int,
    window: int,
    fresh: float,
    fuse: int,
) -> Tensor:
    op = "evict_append_"
    _check.rank(op, "positions", positions, 3, "[batch, units, capacity]")
    _check.dtype(op, "positions", positions, torch.int32)
    _check.last_contiguous(op, "positions", positions)
    _check.require(not _overlaps(positions, 2), op, "positions", "free of overlaps", "a stride of 0")
    _check_row_list(op, "buffers", buffers, "batch, heads, capacity", positions, "positions", is_written=True)
    _check_row_list(op, "rows", rows, "batch, heads, n", positions, "positions", is_written=False)
    _check.require(len(rows) == len(buffers), op, "rows", f"as many tensors as buffers ({len(buffers)})", len(rows))
    batch, units, capacity = positions.shape
    n = rows[0].shape[2]
    for i, (buffer, new) in enumerate(zip(buffers, rows)):
        _check.same_dtype(op, "rows", new, buffer, "buffers")
        got = f"{_check.shape_string(buffer)} at [{i}]"
        _check.require(_fits(buffer, positions), op, "buffers", _must_fit(positions), got)
        must = f"of the shape of buffers {_check.shape_string(buffer)} with n ({n}) for the capacity"
        same = new.shape == (*buffer.shape[:2], n, *buffer.shape[3:])
        _check.require(same, op, "rows", must, f"{_check.shape_string(new)} at [{i}]")
    _unit_counts(op, "lengths", lengths, positions, is_written=True)
    _unit_counts(op, "seen", seen, positions, is_written=True)
    _entry_floats(op, "scores", scores, positions, 3, "[batch, heads, capacity]")
    _entry_floats(op, "history", history, positions, 4, "[batch, heads, capacity, width]")
    if limits is not None:
        _unit_counts(op, "limits", limits, positions, is_written=False)
    _check_sinks(op, sinks, inv_freq, buffers[0])
    _check_eviction(op, n, sink, window, "capacity", capacity, fuse, scores, history)
    return positions.new_empty((batch, units, n))


def _counter(op: str, argument: str, t: Tensor, dtype: torch.dtype, heads: int, positions: Tensor) -> None:
    ok = t.dim() == 1 and t.shape[0] == heads
    _check.require(ok, op, argument, f"[batch * heads] ({heads})", f"{t.dim()}D {_check.shape_string(t)}")
    _check.dtype(op, argument, t, dtype)
    _check.same_device(op, argument, t, positions, "positions")
    _check.last_contiguous(op, argument, t)


def _slot_floats(op: str, argument: str, t: Tensor | None, positions: Tensor, rank: int, layout: str) -> None:
    if t is None:
        return
    _check.rank(op, argument, t, rank, layout)
    _check.dtype(op, argument, t, torch.float32)
    _check.same_device(op, argument, t, positions, "positions")
    slots = positions.shape[0]
    _check.require(t.shape[0] == slots, op, argument, f"of the slots of positions ({slots})", _check.shape_string(t))
    _check.last_contiguous(op, argument, t)
    _check.require(not _overlaps(t, rank - 1), op, argument, "free of overlaps", "a stride of 0")


@library.register_fake("kvcompress::ragged_evict_append_")
def _(
    buffers: Sequence[Tensor],
    rows: Sequence[Tensor],
    positions: Tensor,
    row_start: Tensor,
    lengths: Tensor,
    seen: Tensor,
    limits: Tensor,
    scores: Tensor | None,
    history: Tensor | None,
    max_length: int,
    sink: int,
    window: int,
    fresh: float,
    fuse: int,
) -> Tensor:
    op = "ragged_evict_append_"
    _check.rank(op, "positions", positions, 1, "[slots]")
    _check.dtype(op, "positions", positions, torch.int32)
    _check.last_contiguous(op, "positions", positions)
    slots = positions.shape[0]
    _check_row_list(op, "buffers", buffers, "slots", positions, "positions", is_written=True, dims=1)
    _check_row_list(op, "rows", rows, "batch, heads, n", positions, "positions", is_written=False)
    _check.require(len(rows) == len(buffers), op, "rows", f"as many tensors as buffers ({len(buffers)})", len(rows))
    batch, heads, n = rows[0].shape[:3]
    for i, (buffer, new) in enumerate(zip(buffers, rows)):
        _check.same_dtype(op, "rows", new, buffer, "buffers")
        got = f"{_check.shape_string(buffer)} at [{i}]"
        _check.require(buffer.shape[0] == slots, op, "buffers", f"of the slots of positions ({slots})", got)
        must = f"[{batch}, {heads}, {n}] and the row of buffers {_check.shape_string(buffer)}"
        same = new.shape == (batch, heads, n, *buffer.shape[1:])
        _check.require(same, op, "rows", must, f"{_check.shape_string(new)} at [{i}]")
    _counter(op, "row_start", row_start, torch.int64, batch * heads, positions)
    for name, t in (("lengths", lengths), ("seen", seen), ("limits", limits)):
        _counter(op, name, t, torch.int32, batch * heads, positions)
    _slot_floats(op, "scores", scores, positions, 1, "[slots]")
    _slot_floats(op, "history", history, positions, 2, "[slots, width]")
    must = f"from 0 to the slots of positions ({slots})"
    _check.require(0 <= max_length <= slots, op, "max_length", must, max_length)
    _check_eviction(op, n, sink, window, "max_length", max_length, fuse, scores, history)
    return positions.new_empty((batch, heads, n))


@library.register_fake("kvcompress::history_scores")
def _(history: Tensor, positions: Tensor, lengths: Tensor, seen: Tensor, window: int, fuse: int) -> Tensor:
    op = "history_scores"
    _check.rank(op, "history", history, 4, "[batch, heads, capacity, width]")
    _check.rank(op, "positions", positions, 3, "[batch, units, capacity]")
    _check.dtype(op, "history", history, torch.float32)
    _check.dtype(op, "positions", positions, torch.int32)
    _check.same_device(op, "positions", positions, history, "history")
    _check.last_contiguous(op, "history", history)
    _check.last_contiguous(op, "positions", positions)
    batch, heads, capacity, width = history.shape
    units = positions.shape[1]
    divides = units == 0 if heads == 0 else units > 0 and heads % units == 0
    ok = positions.shape[0] == batch and positions.shape[2] == capacity and divides
    must = f"of the batch ({batch}) and capacity ({capacity}) of history and of units that divide its heads ({heads})"
    _check.require(ok, op, "positions", must, _check.shape_string(positions))
    _check.require(1 <= width <= _MAX_WIDTH, op, "width", "from 1 to 1024", width)
    _unit_counts(op, "lengths", lengths, positions, is_written=False)
    _unit_counts(op, "seen", seen, positions, is_written=False)
    _check.require(window >= 0, op, "window", "at least 0", window)
    _check.require(fuse in (0, 1), op, "fuse", "0 (sum) or 1 (max)", fuse)
    return history.new_empty((batch, heads, capacity))
