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
