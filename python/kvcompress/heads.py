"""Head budgets: how the entries of a layer are split over its heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kvcompress.budget import allocate
from kvcompress.select import topk

__all__ = ["AdaptiveHeads", "HeadBudget", "counts_in_global_top"]


class HeadBudget(Protocol):
    """Scores and mean entries a head -> entries of each head, ``[batch][heads]`` on the host, which sum to heads * mean.

    `scores` ``[batch, heads, seq_len]`` hold +inf where an entry is kept in any case, -inf or NaN where there is none. This waits
    for the device once a layer.
    """

    def __call__(self, scores: Tensor, counts: Sequence[int]) -> list[list[int]]: ...


def counts_in_global_top(scores: Tensor, totals: Sequence[int]) -> Tensor:
    """How many of the ``totals[b]`` largest scores of row b lie in each head: ``[batch, heads]`` int64 on the device.

    All heads of a row compete in one list; ties go to the smaller head, then to the smaller position.
    """
    batch, heads, seq_len = scores.shape
    k = max(totals, default=0)
    wanted = torch.tensor(totals, dtype=torch.int32, device=scores.device)
    index = topk(scores.reshape(batch, 1, heads * seq_len), k, counts=wanted)[:, 0]
    index = torch.where(index < 0, heads * seq_len, index)
    bounds = torch.arange(heads + 1, dtype=torch.int32, device=scores.device) * seq_len
    return torch.searchsorted(index, bounds.expand(batch, -1).contiguous()).diff(dim=-1)


@dataclass(frozen=True)
class AdaptiveHeads:
    """AdaKV's split: a head gets what it wins in one list of all heads' scores, mixed with an equal share.

    ``share[h] = (1 - floor) * won[h] + floor * base`` over the entries that are not forced, base a head; AdaKV, arXiv 2407.11550.

    Attributes:
        floor: weight of the equal share, in [0, 1] (the official floor_alpha).
        normalise: before the competition, scale a head by the share of its mass that its own top `base` hold.
        rounding: "exact" sums to ``heads * base``; "official" rounds each share, half to even, from ``int(floor * base)``, and so
            misses the sum by up to a row a head; "safeguard" is kvpress's rule: each head first keeps its own best
            ``int(floor * mean)`` entries, the rest goes to the best of all heads.
    """

    floor: float = 0.2
    normalise: bool = False
    rounding: Literal["exact", "official", "safeguard"] = "exact"

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"AdaptiveHeads: floor must be in [0, 1], got {self.floor}")
        if self.rounding not in ("exact", "official", "safeguard"):
            raise ValueError(
                f'AdaptiveHeads: rounding must be "exact", "official" or "safeguard", got {self.rounding!r}'
            )

    def __call__(self, scores: Tensor, counts: Sequence[int]) -> list[list[int]]:
        heads = scores.shape[1]
        forced = scores == torch.inf
        free = scores > -torch.inf  # neither padding nor NaN
        forced_counts = forced.sum(-1)
        free_counts = (free & ~forced).sum(-1)
        candidates = torch.where(free & ~forced, scores, -torch.inf)
        # every head has as many forced entries as its row: taken from head 0, one wait for the device
        per_row = torch.stack([forced_counts[:, 0], free_counts[:, 0]], 1).tolist()
        base = [max(0, min(count - kept, left)) for count, (kept, left) in zip(counts, per_row)]
        if self.rounding == "safeguard":
            return self._safeguarded(scores, counts, per_row).tolist()
        if self.normalise:
            candidates = self._normalised(candidates, base)
        won = counts_in_global_top(candidates, [heads * b for b in base]).tolist()
        out = []
        for row, b in enumerate(base):
            kept, left = per_row[row]
            if self.rounding == "official":
                floor = int(b * self.floor)
                shares = [min(round(n * (1 - self.floor) + floor), left) for n in won[row]]
            else:
                weights = [n * (1 - self.floor) + b * self.floor for n in won[row]]
                shares = allocate(heads * b, weights, cap=[left] * heads)
            out.append([kept + share for share in shares])
        return out

    def _normalised(self, candidates: Tensor, base: Sequence[int]) -> Tensor:
        """Each head times (sum of its own top base) / (sum of all)."""
        finite = torch.where(candidates > -torch.inf, candidates, 0)
        ordered = finite.sort(-1, descending=True).values
        rank = torch.arange(finite.shape[-1], device=finite.device)
        limit = torch.tensor(base, device=finite.device)[:, None, None]
        top = torch.where(rank < limit, ordered, 0).sum(-1)
        ratio = top / finite.sum(-1)
        return torch.where(candidates > -torch.inf, candidates * ratio[..., None], -torch.inf)

    def _safeguarded(self, scores: Tensor, counts: Sequence[int], per_row: list[list[int]]) -> Tensor:
        heads = scores.shape[1]
        safe = [min(max(1, int(count * self.floor)), scores.shape[2]) for count in counts]
        own = topk(scores, max(safe), counts=torch.tensor(safe, dtype=torch.int32, device=scores.device))
        where = torch.where(own < 0, scores.shape[2], own).long()  # one column more takes what is no entry
        protected = torch.zeros((*scores.shape[:2], scores.shape[2] + 1), dtype=torch.bool, device=scores.device)
        protected.scatter_(2, where, True)
        raised = torch.where(protected[..., :-1], torch.inf, scores)
        totals = [heads * min(count, kept + left) for count, (kept, left) in zip(counts, per_row)]
        return counts_in_global_top(raised, totals)
