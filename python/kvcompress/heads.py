"""Head budgets: how the entries of a layer are split over its heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kvcompress.budget import allocate
from kvcompress.select import head_counts

__all__ = ["AdaptiveHeads", "HeadBudget", "counts_in_global_top"]


class HeadBudget(Protocol):
    """Scores and mean entries a head -> entries of each head, ``[batch][heads]`` on the host, which sum to heads * mean.

    `scores` ``[batch, heads, seq_len]`` hold +inf where an entry is kept in any case, -inf or NaN where there is none. This waits
    for the device. `layer` is which of the compressed layers, from 0.
    """

    def __call__(self, scores: Tensor, counts: Sequence[int], *, layer: int) -> list[list[int]]: ...

    def bound(self, scores: Tensor, counts: Sequence[int], *, layer: int) -> list[list[int]]:
        """What no head gets more of at these counts or smaller ones: the first cut, where the layer's budget is not final."""
        ...


def counts_in_global_top(scores: Tensor, totals: Sequence[int]) -> Tensor:
    """How many of the ``totals[b]`` largest scores of row b lie in each head: ``[batch, heads]`` int32 on the device.

    All heads of a row compete in one list; ties go to the smaller head, then to the smaller position.
    """
    return head_counts(scores, torch.tensor(totals, dtype=torch.int32, device=scores.device))


@dataclass(frozen=True)
class AdaptiveHeads:
    """AdaKV's split: a head gets what it wins in one list of all heads' scores, mixed with an equal share.

    ``share[h] = (1 - floor) * won[h] + floor * base`` over the entries that are not forced, base a head; AdaKV, arXiv 2407.11550.

    Attributes:
        floor: weight of the equal share, in [0, 1] (the official floor_alpha).
        normalise: before the competition, scale a head by the share of its mass that its own top `base` hold.
        skip: layers whose heads all get the same, the first ones.
        equal_share: with "official" rounding, entries of the equal share in place of ``int(floor * base)``.
        rounding: "exact" sums to ``heads * base``; "official" rounds each share, half to even, from ``int(floor * base)``, and so
            misses the sum by up to a row a head; "safeguard" is kvpress's rule: each head first keeps its own best
            ``int(floor * mean)`` entries, the rest goes to the best of all heads.
    """

    floor: float = 0.2
    normalise: bool = False
    rounding: Literal["exact", "official", "safeguard"] = "exact"
    skip: int = 0
    equal_share: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"AdaptiveHeads: floor must be in [0, 1], got {self.floor}")
        if self.rounding not in ("exact", "official", "safeguard"):
            raise ValueError(
                f'AdaptiveHeads: rounding must be "exact", "official" or "safeguard", got {self.rounding!r}'
            )
        if self.skip < 0:
            raise ValueError(f"AdaptiveHeads: skip must be at least 0 layers, got {self.skip}")
        if self.equal_share is not None and self.rounding != "official":
            raise ValueError(
                f'AdaptiveHeads: equal_share must be None unless rounding is "official", got {self.equal_share} with '
                f"{self.rounding!r}"
            )
        if self.normalise and self.rounding == "safeguard":
            raise ValueError(
                'AdaptiveHeads: normalise must be off for rounding "safeguard", which compares plain scores'
            )

    def __call__(
        self, scores: Tensor, counts: Sequence[int], *, layer: int = 0, weighed_at: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Entries of each head. `weighed_at` are other counts at which `normalise` takes its weights (LAVa's frozen order)."""
        return self._split(scores, counts, layer, bound=False, weighed_at=weighed_at)

    def bound(self, scores: Tensor, counts: Sequence[int], *, layer: int = 0) -> list[list[int]]:
        """Shares rounded up, and at least what a head wins: both only fall with the counts, so later winners are all kept.

        With `normalise` the competition itself changes with the counts; a head then keeps to what it has.
        """
        return self._split(scores, counts, layer, bound=True)

    def _split(
        self,
        scores: Tensor,
        counts: Sequence[int],
        layer: int,
        *,
        bound: bool,
        weighed_at: Sequence[int] | None = None,
    ) -> list[list[int]]:
        heads = scores.shape[1]
        forced = scores == torch.inf
        free = scores > -torch.inf  # neither padding nor NaN
        candidates = torch.where(free & ~forced, scores, -torch.inf)
        # forced and free entries of each head: the first of two waits for the device
        known = torch.stack([forced.sum(-1), (free & ~forced).sum(-1)], 1).tolist()

        def base_of(counts: Sequence[int]) -> list[int]:  # every head has as many forced entries as its row
            return [max(0, min(n - kept[0], max(left))) for n, (kept, left) in zip(counts, known)]

        base = base_of(counts)
        if layer < self.skip:
            return [[k + min(b, most) for k, most in zip(*row)] for b, row in zip(base, known)]
        if self.rounding == "safeguard":
            return self._safeguarded(scores, counts, known).tolist()
        if self.normalise:
            candidates = self._normalised(candidates, base_of(weighed_at or counts))
        won = counts_in_global_top(candidates, [heads * b for b in base]).tolist()
        out = []
        for b, wins, (kept, left) in zip(base, won, known):
            if self.rounding == "official":
                shares = self._official(wins, b)
            else:
                weights = [n * (1 - self.floor) + b * self.floor for n in wins]
                shares = [math.ceil(w) for w in weights] if bound else allocate(heads * b, weights, cap=left)
            if bound:
                shares = [max(share, n) for share, n in zip(shares, wins)]
            out.append([k + min(share, most) for k, share, most in zip(kept, shares, left)])
        return out

    def _official(self, won: Sequence[int], base: int) -> list[int]:
        """Shares in the official float32 arithmetic, each rounded by itself, halves to even."""
        equal = int(base * self.floor) if self.equal_share is None else self.equal_share
        return torch.round(torch.tensor(won) * (1 - self.floor) + equal).int().tolist()

    def _normalised(self, candidates: Tensor, base: Sequence[int]) -> Tensor:
        """Each head times (sum of its own top base) / (sum of all)."""
        finite = torch.where(candidates > -torch.inf, candidates, 0)
        ordered = finite.sort(-1, descending=True).values
        rank = torch.arange(finite.shape[-1], device=finite.device)
        limit = torch.tensor(base, device=finite.device)[:, None, None]
        top = torch.where(rank < limit, ordered, 0).sum(-1)
        ratio = top / finite.sum(-1)
        return torch.where(candidates > -torch.inf, candidates * ratio[..., None], -torch.inf)

    def _safeguarded(self, scores: Tensor, counts: Sequence[int], known: list[list[list[int]]]) -> Tensor:
        heads = scores.shape[1]
        safe = [[max(1, int(count * self.floor))] * heads for count in counts]
        totals = [heads * min(count, kept[0] + max(left)) for count, (kept, left) in zip(counts, known)]
        on = {"dtype": torch.int32, "device": scores.device}
        return head_counts(scores, torch.tensor(totals, **on), floors=torch.tensor(safe, **on))
