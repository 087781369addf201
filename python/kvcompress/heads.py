"""Head budgets: how the entries of a layer are split over its heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kvcompress.budget import Budget, Scores, entries
from kvcompress.layer import LayerState
from kvcompress.select import head_counts

__all__ = ["AdaptiveHeads", "HeadBudget", "OneList", "counts_in_global_top"]


class HeadBudget(Protocol):
    """Scores and mean entries a head -> entries of each head, ``[batch, heads]`` int32 on the device.

    `scores` ``[batch, heads, seq_len]`` hold +inf where an entry is kept in any case, -inf or NaN where there is none. `layer` is
    which of the compressed layers, from 0. `is_exact`: a row's entries sum to heads * mean, so that the host knows the sum
    and nothing waits for the device; `is_exact_bound`: so do those of `bound`. `is_nested`: with smaller counts no head
    gets more than `bound` gave it.
    """

    @property
    def is_exact(self) -> bool: ...

    @property
    def is_exact_bound(self) -> bool: ...

    @property
    def is_nested(self) -> bool: ...

    def __call__(self, scores: Tensor, counts: Sequence[int], *, layer: int) -> Tensor: ...

    def bound(self, scores: Tensor, counts: Sequence[int], *, layer: int) -> Tensor:
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

    @property
    def is_exact(self) -> bool:
        return self.rounding != "official"

    @property
    def is_exact_bound(self) -> bool:
        return self.rounding == "safeguard" or (self.rounding == "exact" and self.floor == 0)

    @property
    def is_nested(self) -> bool:
        return not self.normalise

    def __call__(
        self, scores: Tensor, counts: Sequence[int], *, layer: int = 0, weighed_at: Sequence[int] | None = None
    ) -> Tensor:
        """Entries of each head. `weighed_at` are other counts at which `normalise` takes its weights (LAVa's frozen order)."""
        return self._split(scores, counts, layer, bound=False, weighed_at=weighed_at)

    def bound(self, scores: Tensor, counts: Sequence[int], *, layer: int = 0) -> Tensor:
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
    ) -> Tensor:
        totals = [scores.shape[1] * n for n in counts]
        real = (scores > -torch.inf).sum(-1)  # neither padding nor NaN
        is_one_list = self.rounding == "exact" and self.floor == 0 and not self.normalise
        if layer >= self.skip and (is_one_list or self.rounding == "safeguard"):
            floors = None
            if not is_one_list:
                own = [max(1, int(n * self.floor)) for n in counts]
                floors = torch.tensor(own, dtype=torch.int32, device=scores.device)
                floors = floors[:, None].expand(-1, scores.shape[1]).contiguous()
            wanted = torch.tensor(totals, dtype=torch.int32, device=scores.device)
            return head_counts(scores, wanted, floors=floors, caps=real.int())
        is_forced = scores == torch.inf
        forced = is_forced.sum(-1)
        free = real - forced

        def base_of(counts: Sequence[int]) -> Tensor:  # every head has as many forced entries as its row
            wanted = torch.tensor(counts, device=scores.device) - forced[:, 0]
            return wanted.clamp_min(0).minimum(free.amax(-1))[:, None]

        base = base_of(counts)
        if layer < self.skip:
            return (forced + base.minimum(free)).int()
        if self.normalise:
            weighed = self._normalised(torch.where(is_forced, -torch.inf, scores), base_of(weighed_at or counts))
            scores = torch.where(is_forced, torch.inf, weighed)
        won = (counts_in_global_top(scores, totals) - forced).clamp_min(0).minimum(free)
        if self.rounding == "official":
            shares = self._official(won, base)
        else:
            share = won.double() * (1 - self.floor) + base.double() * self.floor
            shares = share.ceil().long() if bound else _whole(share, scores.shape[1] * base)
        if bound:
            shares = shares.maximum(won)
        return (forced + shares.minimum(free)).int()

    def _official(self, won: Tensor, base: Tensor) -> Tensor:
        """Shares in the official float32 arithmetic, each rounded by itself, halves to even."""
        equal = (base.double() * self.floor).floor() if self.equal_share is None else self.equal_share
        return torch.round(won.float() * (1 - self.floor) + equal).long()

    def _normalised(self, candidates: Tensor, base: Tensor) -> Tensor:
        """Each head times (sum of its own top base) / (sum of all)."""
        finite = torch.where(candidates > -torch.inf, candidates, 0)
        ordered = finite.sort(-1, descending=True).values
        rank = torch.arange(finite.shape[-1], device=finite.device)
        top = torch.where(rank < base[..., None], ordered, 0).sum(-1)
        ratio = top / finite.sum(-1)
        return torch.where(candidates > -torch.inf, candidates * ratio[..., None], -torch.inf)


def _whole(wanted: Tensor, totals: Tensor) -> Tensor:
    """Shares ``[batch, heads]`` float64 as integers that sum to `totals`: largest remainders, ties to the smaller head.

    `allocate` on the device, for shares that no floor or cap binds.
    """
    whole = (wanted + 1e-9).floor()
    order = (wanted - whole).sort(dim=-1, descending=True, stable=True).indices
    missing = totals - whole.long().sum(-1, keepdim=True)
    extra = (torch.arange(wanted.shape[1], device=wanted.device) < missing).long()
    return whole.long() + torch.zeros_like(extra).scatter_(1, order, extra)


@dataclass(frozen=True)
class OneList(Budget):
    """All entries of all layers and heads compete in one list: a head keeps what it wins there, and all of them together
    ``layers * heads * budget``.

    For scores that mean the same everywhere. Forced entries are kept first; ties go to the earlier layer, the smaller head and the
    smaller position. The first layers hold what the list of the layers so far leaves them, which only comes down, so a prompt
    never holds much more than the total and the current layer. This waits for the device once a layer.

    Attributes:
        budget: mean entries a head: a count, or a share of the row's prompt.
    """

    budget: int | float
    deferred = True
    across_heads = True

    def __post_init__(self) -> None:
        entries(self.budget, 1)

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        """The most that a layer can win: all of the total."""
        return [min(n, layer.num_layers * entries(self.budget, n)) for n in layer.lengths]

    def keeps_all(self, length: int) -> bool:
        return entries(self.budget, length) >= length

    def measure(self, layer: LayerState, scores: Scores) -> Tensor:
        return scores()

    def settle_heads(
        self, measured: Sequence[Tensor], lengths: Sequence[int], *, floor: int, layers: int | None = None
    ) -> list[list[list[int]]]:
        device = measured[0].device
        joint = torch.cat([scores.to(device) for scores in measured], dim=1)  # [batch, layers so far * heads, seq_len]
        heads = measured[0].shape[1]
        means = [min(length, max(entries(self.budget, length), floor)) for length in lengths]
        totals = [
            min((layers or len(measured)) * heads * mean, joint.shape[1] * length)
            for mean, length in zip(means, lengths)
        ]
        won = counts_in_global_top(joint, totals).tolist()
        return [[row[first : first + heads] for row in won] for first in range(0, len(won[0]) if won else 0, heads)]
