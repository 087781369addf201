"""Row movers in plain Python: one row at a time, from a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

INF = float("inf")


def compact(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """What kvcompress.compact_ leaves in each tensor."""
    out = [t.clone() for t in tensors]
    for b, heads in enumerate(index.tolist()):
        for h, entries in enumerate(heads):
            slots = [i for i, entry in enumerate(entries) if entry >= 0]
            sources = [entries[i] for i in slots]
            for old, new in zip(tensors, out):
                new[b, h, slots] = old[b, h, sources]
    return out


def compact_ragged(tensors: Sequence[Tensor], index: Tensor, indptr: Tensor, row_start: Tensor) -> list[Tensor]:
    """What kvcompress.compact_ragged_ leaves in each tensor."""
    out, entries, first = [t.clone() for t in tensors], index.tolist(), indptr.tolist()
    for head, start in enumerate(row_start.tolist()):
        for i, entry in enumerate(entries[first[head] : first[head + 1]]):
            if entry >= 0:
                for old, new in zip(tensors, out):
                    new[start + i] = old[start + entry]
    return out


def gather(tensors: Sequence[Tensor], index: Tensor, capacity: int) -> list[Tensor]:
    """As kvcompress.gather."""
    batch, heads, _ = index.shape
    outs = []
    for t in tensors:
        out = torch.zeros((batch, heads, capacity, *t.shape[3:]), dtype=t.dtype, device=t.device)
        for b, rows in enumerate(index.tolist()):
            for h, entries in enumerate(rows):
                for i, entry in enumerate(entries):
                    if entry >= 0:
                        out[b, h, i] = t[b, h // (heads // t.shape[1]), entry]
        outs.append(out)
    return outs


def gather_ragged(
    tensors: Sequence[Tensor], index: Tensor, indptr: Tensor, row_start: Tensor, total: int
) -> list[Tensor]:
    """As kvcompress.gather_ragged."""
    parts, starts, entries = indptr.tolist(), row_start.tolist(), index.tolist()
    outs = []
    for t in tensors:
        heads = len(starts) // max(t.shape[0], 1)
        out = torch.zeros((total, *t.shape[3:]), dtype=t.dtype, device=t.device)
        for row, start in enumerate(starts):
            for i, entry in enumerate(entries[parts[row] : parts[row + 1]]):
                if entry >= 0:
                    out[start + i] = t[row // heads, row % heads // (heads // t.shape[1]), entry]
        outs.append(out)
    return outs


def append(buffers: Sequence[Tensor], rows: Sequence[Tensor], slots: Tensor) -> list[Tensor]:
    """What kvcompress.append_ leaves in each buffer."""
    out = [buffer.clone() for buffer in buffers]
    for b, row in enumerate(slots.tolist()):
        for t, slot in enumerate(row):
            if slot >= 0:
                for buffer, new in zip(out, rows):
                    buffer[b, :, slot] = new[b, :, t]
    return out


def _leaves_first(score: float, position: int, seen: int, sink: int, window: int) -> tuple[bool, bool, float, int]:
    """The order in which entries leave: unprotected, NaN, low, late."""
    is_nan = math.isnan(score)
    return (position < sink or position >= seen - window, not is_nan, 0.0 if is_nan else score, -position)


def evict_append(
    buffers: Sequence[Tensor],
    rows: Sequence[Tensor],
    positions: Tensor,
    lengths: Tensor,
    seen: Tensor,
    *,
    scores: Tensor | None = None,
    history: Tensor | None = None,
    limits: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    fresh: float = 0.0,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What kvcompress.evict_append_ returns and leaves: slots, buffers, positions, lengths, seen, scores, history."""
    buffers = [t.clone() for t in buffers]
    positions, lengths, seen = positions.clone(), lengths.clone(), seen.clone()
    scores = None if scores is None else scores.clone()
    history = None if history is None else history.clone()
    batch, units, capacity = positions.shape
    n = rows[0].shape[2]
    slots = torch.full((batch, units, n), -1, dtype=torch.int32)
    for b in range(batch):
        for u in range(units):

            def heads(t: Tensor, u: int = u) -> slice:
                each = t.shape[1] // units
                return slice(u * each, (u + 1) * each)

            limit = capacity if limits is None else min(int(limits[b, u]), capacity)
            first, held, taken = int(seen[b, u]), int(lengths[b, u]), []
            at = positions[b, u, :held].tolist()
            ranks = [float(position) for position in at]  # without scores the oldest leaves
            if scores is not None:
                total = scores[b, heads(scores)][0, :held].clone()
                for row in scores[b, heads(scores)][1:, :held]:
                    total += row  # float32, in the order of the heads
                ranks = total.tolist()
            length = held
            for t in range(n):
                if length < limit:
                    taken.append(length)
                    length += 1
                    continue
                left = [slot for slot in range(held) if slot not in taken]
                order = [(*_leaves_first(ranks[j], at[j], first + t, sink, window), j) for j in left]
                taken.append(min(order)[-1] if order else -1)
            for t, slot in enumerate(taken):
                if slot < 0:
                    continue
                for buffer, new in zip(buffers, rows):
                    buffer[b, heads(buffer), slot] = new[b, heads(new), t]
                positions[b, u, slot] = first + t
                if scores is not None:
                    scores[b, heads(scores), slot] = fresh
                if history is not None:
                    history[b, heads(history), slot] = -INF
            slots[b, u] = torch.tensor(taken, dtype=torch.int32)
            lengths[b, u] = length
            seen[b, u] = first + n
    return slots, buffers, positions, lengths, seen, scores, history
