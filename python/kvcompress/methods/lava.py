"""LAVa."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvcompress import score, select
from kvcompress.budget import Budget, Scores, Uniform, allocate, entries
from kvcompress.heads import AdaptiveHeads
from kvcompress.layer import LayerState
from kvcompress.methods import Method, inner_stages, register
from kvcompress.pipeline import Select, Stages


@register("lava", title="LAVa", paper="arXiv 2509.09754")
@dataclass(frozen=True)
class LAVa(Method):
    """Head and layer budgets from one score that bounds what an eviction can change in the layer's attention output.

    ``score[g, j] = max over the query heads h of g of pool_j(mean_i A[h, i, j]) * max_j |v[g, j]|_1`` over the prefix, A the
    attention of the last `window` prompt queries. One list of all heads' scores splits a layer over its heads. Layers share
    ``L * (budget - window)`` entries a head in proportion to the normalised entropy of their scores, ``e = -sum p log p / log n``
    over all n scores of a layer, so that layers with spread scores get more. Stored ragged; decoding appends.

    Memory during prefill: the budgets of the first layers are bounds that come down as later layers are measured. Layers are cut
    again, those with most to give first, once they hold an eighth more than their bounds, so at most ``9 / 8 * L * budget``
    entries a head are held, and beside them one layer's full K and V, and 4 bytes an entry and kv head of the prompt for the
    scores.

    Departures from MGDDestiny/Lava@71d3cc8:
        - `floor` is 0, as in the paper (their scripts: 0.2 and 0.5), and weighs the layer's own budget. Theirs stays the integer
          ``int(budget * floor)`` for every layer, window included, for a misspelt attribute, and keeps more than the total.
        - budgets are exact: largest remainders over layers and heads, and what a short prompt cannot use goes to the other
          layers (official: int() and rounding each lose or win up to a row). ``compat=True`` gives their integers, floor included.
        - scores, norms and entropies in float32 and float64 (official: the model's dtype).
        - budgets are per sequence of a batch, padding counts nowhere; storage is per kv head only.
        - a prompt that fits is kept whole (official: a crash).
        - `normalise` weighs heads at the counts of each cut (official: at those of the first re-cut, for good); a head cannot get
          back what an earlier cut took, so that a layer may end with fewer entries than its budget.

    Attributes:
        budget: mean entries a head keeps in a layer, window included.
        window: observing queries, always kept.
        kernel_size: odd width of the pooling.
        pool: "max", "avg" or "none".
        floor: weight of an equal share of the layer's heads, in [0, 1] (the official floor_alpha).
        normalise: before heads compete, scale one by the share of its mass that its own best hold.
        skip: first layers, whose heads all get the same.
        layers: "entropy", or "uniform": only the heads of a layer differ.
        compat: the official integers; needs an int `budget`.
        inner: a method whose scores and selection are taken in place of LAVa's own, by name or built.
    """

    window: int = 32
    kernel_size: int = 7
    pool: Literal["avg", "max", "none"] = "max"
    floor: float = 0.0
    normalise: bool = False
    skip: int = 0
    layers: Literal["entropy", "uniform"] = "entropy"
    compat: bool = False
    inner: Method | str | None = None

    def stages(self) -> Stages:
        if self.layers not in ("entropy", "uniform"):
            raise ValueError(f'lava: layers must be "entropy" or "uniform", got {self.layers!r}')
        if self.inner is not None:
            stages = inner_stages(self.name, self.inner, self.budget)
            if stages.is_ragged:
                raise ValueError(f"lava: inner must be a method that gives all heads the same, got {self.inner}")
        else:
            if isinstance(self.budget, int) and self.budget <= self.window:
                raise ValueError(
                    f"lava: budget must be more than the window of {self.window} entries, got {self.budget}"
                )
            own = BoundOfOutput(self.window, self.pool, self.kernel_size)
            stages = Stages(own, Uniform(self.budget), select.TopK(window=self.window))
        rounding: Literal["exact", "official"] = "exact"
        equal_share = None
        if self.compat:
            if not isinstance(self.budget, int):
                raise ValueError(f"lava: budget must be an int for compat, got {self.budget}")
            rounding, equal_share = "official", int(self.budget * self.floor)
        heads = AdaptiveHeads(self.floor, self.normalise, rounding, self.skip, equal_share)
        if self.layers == "uniform":
            return replace(stages, heads=heads)
        return replace(stages, budget=EntropyShare(self.budget, stages.select, self.compat), heads=heads)


@dataclass(frozen=True)
class BoundOfOutput:
    """Pooled window attention times the largest value norm: how far evicting an entry can move the attention output."""

    window: int
    pool: score.Pool
    kernel_size: int
    by_position = False
    is_mass = True
    wants_lse = True

    def __post_init__(self) -> None:
        self._attention()

    def _attention(self) -> score.WindowAttention:
        return score.WindowAttention(
            self.window,
            window_reduce="mean",
            group_reduce="max",
            pool=self.pool,
            kernel_size=self.kernel_size,
            pool_first=True,
        )

    @property
    def queries(self) -> int:
        return self.window

    def __call__(self, layer: LayerState) -> Tensor:
        scores = self._attention()(layer)
        # the norm is one factor for all query heads of a kv head, so it may follow their maximum
        return torch.where(scores.isfinite(), scores * self.value_norm(layer)[..., None], scores)

    def value_norm(self, layer: LayerState) -> Tensor:
        """``max over prefix entries j of sum_d |v[g, j, d]|``, ``[batch, num_kv_heads]`` float32."""
        prefix = max(layer.seq_len - self.window, 0)
        norms = score.by_chunks(lambda part: part.abs().sum(-1), layer.values[:, :, : max(prefix, 1)])
        if layer.seq_start is not None:
            column = torch.arange(norms.shape[2], device=norms.device)
            norms = norms.masked_fill(column < layer.seq_start[:, None, None], 0)
        return norms.amax(-1)

    def __str__(self) -> str:
        return f"attention of the last {self.window} prompt tokens times the norm of the values"


@dataclass(frozen=True)
class EntropyShare(Budget):
    """Layer budgets in proportion to the normalised entropy of the layer's scores, per sequence.

    Attributes:
        budget: mean entries (int) or share of the prompt (float) a layer.
        select: what is kept whatever its score; those entries have no part in the entropy and are in every layer's budget.
        truncate: each layer rounded down, and what a full layer leaves is lost (official).
    """

    budget: int | float
    select: Select
    truncate: bool = False
    deferred = True
    needs_mass = True

    def __post_init__(self) -> None:
        entries(self.budget, 1)

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        """The most that any scores can give one layer: all of the total."""
        return [min(n, layer.num_layers * entries(self.budget, n)) for n in layer.lengths]

    def keeps_all(self, length: int) -> bool:
        return entries(self.budget, length) >= length

    def measure(self, layer: LayerState, scores: Scores) -> Tensor:
        """Normalised entropy of all free scores of a layer, ``[batch]`` float64, in [0, 1]; 1 where fewer than two are free."""
        counts = [entries(self.budget, n) for n in layer.lengths]
        raised = self.select.raised(scores(), counts, seq_start=layer.seq_start)
        free = raised.isfinite()
        mass = torch.where(free, raised, 0).double()
        p = mass / (mass.sum((1, 2), keepdim=True) + 1e-16)
        entropy = -(p * (p + 1e-16).log()).sum((1, 2))
        count = free.sum((1, 2))
        return torch.where(count > 1, entropy / count.clamp_min(2).log(), 1.0)

    def settle(
        self, measured: Sequence[Tensor], lengths: Sequence[int], *, floor: int, layers: int | None = None
    ) -> list[list[int]]:
        columns, layers = [], layers or len(measured)
        for row, length in enumerate(lengths):
            forced = min(self.select.forced, length)
            room = length - forced
            total = layers * max(entries(self.budget, length) - forced, 0)
            shares = [max(float(layer[row]), 0.0) for layer in measured]
            if self.truncate:
                scale = sum(shares) or 1.0
                free = [min(int(share / scale * total), room) for share in shares]
            else:
                free = allocate(total, shares, cap=[room] * len(shares))
            if not self.truncate and len(measured) < layers:
                free = [min(n + 1, room) for n in free]  # a remainder may still round up
            columns.append([max(n + forced, floor) for n in free])
        return [list(row) for row in zip(*columns)]
