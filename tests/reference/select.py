"""Selection in plain Python: sort all positions by rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _rank(score: float, is_forced: bool) -> tuple[bool, bool, float]:
    """Sorts forced entries first, then scores from the largest, then NaN."""
    is_nan = math.isnan(score)
    return not is_forced, is_nan and not is_forced, 0.0 if is_forced or is_nan else -score


def topk(
    scores: Tensor,
    k: int,
    sink: int = 0,
    window: int = 0,
    counts: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
) -> Tensor:
    """As kvcompress.topk."""
    batch, heads, seq_len = scores.shape
    index = torch.full((batch, heads, k), -1, dtype=torch.int32)
    for b in range(batch):
        start = 0 if seq_start is None else min(max(int(seq_start[b]), 0), seq_len)
        end = seq_len if seq_end is None else min(max(int(seq_end[b]), start), seq_len)
        count = min(k if counts is None else max(int(counts[b]), 0), k, end - start)
        for h in range(heads):
            ranks = [
                _rank(score, position < start + sink or position >= end - window)
                for position, score in enumerate(scores[b, h].tolist())
            ]
            kept = sorted(sorted(range(start, end), key=ranks.__getitem__)[:count])  # stable: ties stay in order
            index[b, h, :count] = torch.tensor(kept, dtype=torch.int32)
    return index


def topk_ragged(
    scores: Tensor,
    counts: Tensor,
    total: int,
    sink: int = 0,
    window: int = 0,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As kvcompress.topk_ragged: one topk a head, the kept entries in one list."""
    batch, heads, seq_len = scores.shape
    index: list[int] = []
    indptr = [0]
    for b in range(batch):
        rows = [None if v is None else v[b : b + 1] for v in (seq_start, seq_end)]
        for h in range(heads):
            own = topk(scores[b, h][None, None], seq_len, sink, window, counts[b, h][None], *rows)
            index += [i for i in own.flatten().tolist() if i >= 0]
            indptr.append(min(len(index), total))
    index = index[:total] + [-1] * (total - len(index))
    return torch.tensor(index, dtype=torch.int32), torch.tensor(indptr, dtype=torch.int32)


def head_counts(
    scores: Tensor,
    totals: Tensor,
    floors: Tensor | None = None,
    caps: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
) -> Tensor:
    """As kvcompress.head_counts: each head's floor first, then one sorted list of what is left below the caps."""
    batch, heads, seq_len = scores.shape
    counts = torch.zeros((batch, heads), dtype=torch.int32)
    for b in range(batch):
        start = 0 if seq_start is None else min(max(int(seq_start[b]), 0), seq_len)
        end = seq_len if seq_end is None else min(max(int(seq_end[b]), start), seq_len)
        rest = []  # (rank, head, position) of entries that compete
        for h in range(heads):
            cap = end - start if caps is None else min(max(int(caps[b, h]), 0), end - start)
            floor = 0 if floors is None else min(max(int(floors[b, h]), 0), cap)
            values = scores[b, h].tolist()
            order = sorted((_rank(values[i], False), h, i) for i in range(start, end))
            counts[b, h] = floor
            rest += order[floor:cap]
        left = max(int(totals[b]) - int(counts[b].sum()), 0)
        for _, h, _ in sorted(rest)[:left]:
            counts[b, h] += 1
    return counts
