"""Row movers in plain Python: one row at a time, from a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def gather_ragged(tensors: Sequence[Tensor], index: Tensor, row_start: Tensor, total: int) -> list[Tensor]:
    """As kvcompress.gather_ragged."""
    heads, starts = index.shape[1], row_start.tolist()
    outs = []
    for t in tensors:
        out = torch.zeros((total, *t.shape[3:]), dtype=t.dtype, device=t.device)
        for b, rows in enumerate(index.tolist()):
            for h, entries in enumerate(rows):
                for i, entry in enumerate(entries):
                    if entry >= 0:
                        out[starts[b * heads + h] + i] = t[b, h // (heads // t.shape[1]), entry]
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
