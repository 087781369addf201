"""Budgets in plain float64 torch."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor


def cosine_importance(
    before: Tensor, after: Tensor, seq_start: Tensor | None = None, is_update: bool = False
) -> Tensor:
    """As kvcompress.cosine_importance, float64."""
    if is_update:
        after = before + after  # in the dtype, as the model adds
    h, a = before.double(), after.double()
    cosine = (h * a).sum(-1) / (h.norm(dim=-1).clamp_min(1e-8) * a.norm(dim=-1).clamp_min(1e-8))
    starts = [0] * len(h) if seq_start is None else seq_start.tolist()
    return torch.stack([row[start:].mean() for row, start in zip(cosine, starts)])


def mass_count(mass: Tensor, share: float) -> Tensor:
    """As kvcompress.mass_count, in whole numbers of Python."""
    rows = []
    for row in mass.flatten(0, 1).tolist():
        units = sorted((round(x * 2**40) if 0 < x < float("inf") else 0 for x in row), reverse=True)
        wanted = share * float(sum(units))
        reached = [float(held) >= wanted for held in accumulate(units)]
        rows.append(1 + reached.index(True) if reached else 0)
    return torch.tensor(rows, dtype=torch.int32).view(mass.shape[:2])


def heads_of_global_list(scores: Tensor, base: int, weighed_at: int, normalise: bool) -> list[int]:
    """The head of each of the ``heads * base`` best of all scores ``[heads, n]``, best first; LAVa's and AdaKV's list.

    With `normalise` a head is first scaled by the share of its mass that its own best `weighed_at` hold. Ties go to the smaller
    head, then to the smaller position.
    """
    entries = []
    for head, row in enumerate(scores.double().tolist()):
        best = sorted(row, reverse=True)
        weight = sum(best[:weighed_at]) / sum(row) if normalise else 1.0
        entries += [(-weight * score, head, position) for position, score in enumerate(row)]
    return [head for _, head, _ in sorted(entries)[: len(scores) * base]]


def frozen_heads(scores: Tensor, budgets: list[int], floor: float, equal: int) -> list[int]:
    """Entries of each head after the official LAVa has cut a layer to each of `budgets` in turn, normalised.

    The first cut counts in a list with its own weights; the second makes a list with its own, and that one stays: all
    later cuts count in a prefix of it. A cut to more than the last one is skipped, and heads never grow.
    """
    heads, n = scores.shape
    kept, last, frozen = [n] * heads, n, None
    for cut, budget in enumerate(b for b in budgets if b <= n):
        if budget > last:
            continue
        if cut < 2:
            frozen = heads_of_global_list(scores, budget, budget, normalise=True)
        won = [frozen[: heads * budget].count(head) for head in range(heads)]
        shares = [min(round(count * (1 - floor) + equal), n) for count in won]
        kept, last = [min(a, b) for a, b in zip(kept, shares)], budget
    return kept
