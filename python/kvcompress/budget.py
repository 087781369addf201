"""Budgets: how many entries may each layer and each head keep?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, library

from kvcompress import _check
from kvcompress.layer import LayerState
from kvcompress.score import ReceivedAttention

__all__ = [
    "Budget",
    "PrefixMass",
    "Pyramid",
    "Squeeze",
    "Table",
    "Targets",
    "Uniform",
    "ZigZag",
    "allocate",
    "cosine_importance",
    "cumulative_mass",
    "entries",
    "kmeans_1d",
    "mass_before",
    "mass_count",
    "prefix_lengths",
    "squeeze_ratios",
]

_MAX_INT32 = 2**31 - 1


def cosine_importance(
    before: Tensor, after: Tensor, *, seq_start: Tensor | None = None, is_update: bool = False
) -> Tensor:
    """Mean cosine similarity of the residual stream before and after a block, one number a sequence.

    ``out[b] = mean over real tokens s of <h, a> / (max(|h|, eps) * max(|a|, eps))``, ``eps = 1e-8``, with
    ``h = before[b, s]`` and ``a = after[b, s]``; near 1 means that the block barely turns the stream, so the
    layer needs little cache. SqueezeAttention (arXiv 2404.04793) splits the budget over the layers by it. Sums are
    float32 whatever the dtype (the official code stays in bfloat16, which cannot tell 0.985 from 0.989).

    Args:
        before: ``[batch, seq_len, hidden]`` float32, float16 or bfloat16; the stream that enters the block.
        after: same shape and dtype; the stream behind the block's residual add.
        seq_start: ``[batch]`` int32, first real token of each row (left padding); None: no padding.
        is_update: ``after`` holds the block's output instead, and the op forms ``before + after`` in registers, rounded
            to the dtype as the model rounds it: no second pass over the stream.

    Returns:
        ``[batch]`` float32 in [-1, 1]; NaN for a row without real tokens.

    Raises:
        ValueError, TypeError: ``cosine_importance: argument must be ..., got ...``.

    Scratch: ``4 * batch * ceil(seq_len / 16)`` bytes.

    Example:
        >>> h, attn_out = torch.randn(2, 128, 64), torch.randn(2, 128, 64)
        >>> kvcompress.cosine_importance(h, attn_out, is_update=True).shape
        torch.Size([2])
    """
    return _check.call(torch.ops.kvcompress.cosine_importance.default, before, after, seq_start, is_update)


@torch.library.register_fake("kvcompress::cosine_importance")
def _(before: Tensor, after: Tensor, seq_start: Tensor | None, is_update: bool) -> Tensor:
    op = "cosine_importance"
    _check.rank(op, "before", before, 3, "[batch, seq_len, hidden]")
    _check.rank(op, "after", after, 3, "[batch, seq_len, hidden]")
    _check.float_dtype(op, "before", before)
    _check.same_dtype(op, "after", after, before, "before")
    _check.same_device(op, "after", after, before, "before")
    must = f"of the shape of before {_check.shape_string(before)}"
    _check.require(after.shape == before.shape, op, "after", must, _check.shape_string(after))
    _check.last_contiguous(op, "before", before)
    _check.last_contiguous(op, "after", after)
    _check.row_vector(op, "seq_start", seq_start, before.shape[0], before, "before")
    return before.new_empty((before.shape[0],), dtype=torch.float32)


def mass_count(mass: Tensor, share: float) -> Tensor:
    """How many of the largest entries of each head hold a share of its sum.

    With S_k the sum of the k largest entries, the least ``k >= 1`` with ``S_k >= share * S_n``: the inverse of a Lorenz curve, for
    ZigZagKV (arXiv 2412.09036) the entries that a head needs to keep most of its attention. Sums are fixed-point numbers in
    units of 2^-40, as in `cumulative_mass`, so every device and every order of summation gives the same count.

    Args:
        mass: ``[batch, heads, seq_len]`` float32, not negative; any strides with a contiguous last dimension. Entries up to 1 and
            rows of up to 2^22 of them fit, and so do column sums of as many queries. Padding (-inf), NaN and +inf count as 0.
        share: in (0, 1].

    Returns:
        ``[batch, heads]`` int32, at least 1; 0 for rows without entries.

    Raises:
        ValueError, TypeError: ``mass_count: argument must be ..., got ...``.

    Scratch: none on CUDA; 32 KiB a thread on the CPU.

    Example:
        >>> kvcompress.mass_count(torch.tensor([[[0.05, 0.5, 0.15, 0.2, 0.1]]]), 0.9)
        tensor([[4]], dtype=torch.int32)
    """
    return _check.call(torch.ops.kvcompress.mass_count.default, mass, share)


@library.register_fake("kvcompress::mass_count")
def _(mass: Tensor, share: float) -> Tensor:
    op = "mass_count"
    _check.rank(op, "mass", mass, 3, "[batch, heads, seq_len]")
    _check.dtype(op, "mass", mass, torch.float32)
    _check.last_contiguous(op, "mass", mass)
    _check.require(mass.shape[2] <= _MAX_INT32, op, "mass", f"of at most {_MAX_INT32} entries a head", mass.shape[2])
    _check.require(0 < share <= 1, op, "share", "in (0, 1]", f"{share:f}")
    return mass.new_empty(mass.shape[:2], dtype=torch.int32)


# --- host-side arithmetic, in plain integers and float64


def entries(budget: int | float, length: int) -> int:
    """Entries that `budget` means for a row of `length` tokens: a count as it is, a share as ``max(1, int(share * length))``.

    Raises:
        ValueError: a count below 1, a share outside (0, 1], NaN.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"entries: budget must be an int (entries) or a float (share), got {type(budget).__name__}")
    if isinstance(budget, int):
        if budget < 1:
            raise ValueError(f"entries: budget must be at least 1 entry, got {budget}")
        return budget
    if not 0 < budget <= 1:
        raise ValueError(f"entries: budget must be a share in (0, 1] or an int, got {budget}")
    return max(1, int(budget * length))


def allocate(
    total: int,
    weights: Sequence[float],
    *,
    base: float = 0.0,
    floor: Sequence[int] | int = 0,
    cap: Sequence[int] | None = None,
) -> list[int]:
    """Splits `total` entries in proportion to `weights`, exactly: the one allocator of all budget rules.

    Every share lies in ``[floor, cap]``; what a capped share cannot take, or a floored one takes too much, is redistributed over the
    others by the same weights; fractions go to the largest remainders, ties to the smaller index.

    Args:
        total: entries to hand out.
        weights: one non-negative finite number a share; if all free ones are zero, they share equally.
        base: what every share gets before the weights split the rest; lowered to an equal share of `total`.
        floor: least entries of each share (lowered to its cap).
        cap: most entries of each share; None: no cap.

    Returns:
        Integers that sum to `total`, clamped to what floors and caps allow.

    Raises:
        ValueError: a negative, infinite or NaN weight; lists of different lengths.

    Example:
        >>> allocate(10, [1, 1, 2])
        [3, 2, 5]
        >>> allocate(10, [1, 1, 2], cap=[9, 9, 3])
        [4, 3, 3]
    """
    count = len(weights)
    weight = np.asarray(weights, dtype=np.float64)
    if not np.all(np.isfinite(weight)) or np.any(weight < 0):
        raise ValueError(f"allocate: weights must be finite and not negative, got {list(weights)}")
    caps = np.full(count, total, dtype=np.int64) if cap is None else np.asarray(cap, dtype=np.int64)
    floors = np.full(count, floor, dtype=np.int64) if isinstance(floor, int) else np.asarray(floor, dtype=np.int64)
    if len(caps) != count or len(floors) != count:
        raise ValueError(
            f"allocate: floor and cap must have {count} entries as weights, got {len(floors)} and {len(caps)}"
        )
    floors = np.minimum(floors, caps)
    total = int(np.clip(total, floors.sum(), caps.sum()))

    # Water-filling: fix the shares that break a bound, in the direction that breaks more, until none does.
    share = np.zeros(count)
    free = np.ones(count, dtype=bool)
    while free.any():
        rest = total - share[~free].sum()
        equal = min(base, rest / free.sum())
        rest -= equal * free.sum()
        free_weight = weight[free]
        scale = free_weight.sum()
        wanted = equal + (rest * (free_weight / scale) if scale > 0 else np.full(free.sum(), rest / free.sum()))
        over = np.maximum(wanted - caps[free], 0)
        under = np.maximum(floors[free] - wanted, 0)
        if not over.any() and not under.any():
            share[free] = wanted
            break
        fixed = over > 0 if over.sum() >= under.sum() else under > 0
        where = np.flatnonzero(free)[fixed]
        share[where] = caps[where] if over.sum() >= under.sum() else floors[where]
        free[where] = False

    whole = np.clip(np.floor(share + 1e-9).astype(np.int64), floors, caps)
    remainder = share - whole
    missing = total - int(whole.sum())
    while missing != 0:  # at most one round each way but for rounding in the last bit
        step = 1 if missing > 0 else -1
        movable = whole < caps if step > 0 else whole > floors
        order = [i for i in np.argsort(-step * remainder, kind="stable") if movable[i]][: abs(missing)]
        whole[order] += step
        remainder[order] -= step
        missing -= step * len(order)
    return whole.tolist()


def kmeans_1d(values: Sequence[float], clusters: int) -> list[int] | None:
    """Exact k-means in one dimension: the clusters of the least sum of squared deviations, 0 = lowest centre.

    Sorted values and prefix sums make it a search over break points, ``O(clusters * n^2)``. The official SqueezeAttention
    starts scikit-learn's k-means once, unseeded, and misses the optimum in about a fifth of the profiles.

    Returns:
        The cluster of each value, equal values in one cluster wherever that costs nothing; None if there are fewer than
        `clusters` distinct values.
    """
    value = np.asarray(values, dtype=np.float64)
    n = len(value)
    if len(np.unique(value)) < clusters:
        return None
    order = np.argsort(value, kind="stable")
    centred = value[order] - value.mean()  # keeps the prefix sums of squares small, so exact enough
    sums = np.concatenate([[0.0], np.cumsum(centred)])
    squares = np.concatenate([[0.0], np.cumsum(centred**2)])

    def cost(i: int, j: int) -> float:  # of one cluster over the sorted values [i, j)
        return (squares[j] - squares[i]) - (sums[j] - sums[i]) ** 2 / (j - i)

    best = np.full((clusters + 1, n + 1), np.inf)
    cut = np.zeros((clusters + 1, n + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for k in range(1, clusters + 1):
        for j in range(k, n + 1):
            options = [best[k - 1, i] + cost(i, j) for i in range(k - 1, j)]
            first = int(np.argmin(options))
            best[k, j], cut[k, j] = options[first], first + k - 1
    groups = np.zeros(n, dtype=np.int64)
    end = n
    for k in range(clusters, 0, -1):
        start = int(cut[k, end])
        groups[order[start:end]] = k - 1
        end = start
    return groups.tolist()


def squeeze_ratios(groups: Sequence[int] | None, layers: int, keep: float, keep_unimportant: float) -> list[float]:
    """SqueezeAttention's split: the top group keeps `keep_unimportant`, the others share the rest of ``layers * keep``.

    ``r3 = keep_unimportant``, ``r12 = (layers * keep - |G3| * r3) / (layers - |G3|)``; without groups all keep `keep`.
    """
    if groups is None:
        return [keep] * layers
    top = max(groups)
    size = groups.count(top)
    others = (layers * keep - size * keep_unimportant) / (layers - size)
    return [keep_unimportant if group == top else others for group in groups]


# --- statistics of scores


def cumulative_mass(mass: Tensor) -> Tensor:
    """Sums of the largest 1, 2, ..., n entries of each row, ``[..., n]`` int64 in units of 2^-40.

    Fixed point, so that every device and every order of summation gives the same: no float scan does, and a float32 one stalls
    on long rows. Entries up to 1 and rows of up to 2^22 of them fit, and so do column sums of as many queries.

    Args:
        mass: ``[..., n]`` float32, not negative; -inf (padding) and NaN count as none.
    """
    mass = mass.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return (mass.sort(-1, descending=True).values.double() * 2.0**40).round().long().cumsum(-1)


def prefix_lengths(curves: Sequence[np.ndarray], total: int) -> list[int]:
    """Prefixes of `total` entries in all whose mass passes one common threshold: PrefixKV's search, without a tolerance.

    Entry i of a layer is in its prefix if what stands before it, ``curve[i]``, is less than p. The lengths change only where
    p passes a value of some curve, so a bisection down to neighbouring floats finds the one place; entries that tie there go
    to the lower layers.

    Args:
        curves: one ascending array a layer, the share of the layer's mass before each entry, so it begins with 0.
        total: entries to hand out, at most those of all curves.

    Example:
        >>> prefix_lengths([np.array([0, 0.5, 0.8, 0.9]), np.array([0, 0.1, 0.2, 0.3])], 5)
        [1, 4]
    """

    def below(p: float) -> list[int]:
        return [int(np.searchsorted(curve, p, side="left")) for curve in curves]

    low, high = 0.0, 2.0  # none, all
    while low < (middle := (low + high) / 2) < high:
        if sum(below(middle)) < total:
            low = middle
        else:
            high = middle
    lengths = below(low)
    for layer, most in enumerate(below(high)):
        lengths[layer] += min(most - lengths[layer], max(total - sum(lengths), 0))
    return lengths


# --- budget stages

Targets = Sequence[int | list[int]]  # mean entries a head of each row, or entries of each row and head
Scores = Callable[[], Tensor]  # the layer's scores [batch, heads, seq_len], computed once, on the first call


class Budget(ABC):
    """How many entries each layer and row may keep.

    Attributes:
        deferred: the final numbers need all layers. `measure` says what a layer shows, and `settle` decides; asked before the last
            layer it gives upper bounds for the measured ones, which come down with every layer.
        wants_residual: what `settle` gets is each layer's residual cosine, not `measure`.
        across_heads: `settle_heads` decides instead of `settle`: heads of a layer keep different numbers of entries.
        needs_mass: it compares shares of the scores' sums, so they must not be negative.
        queries: how many of the last prompt queries it looks at itself, whatever the score needs.
        wants_lse: it looks at their attention, so that the log-sum-exp of the prompt's own saves it a pass over K.
    """

    deferred: ClassVar[bool] = False
    wants_residual: ClassVar[bool] = False
    across_heads: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = False
    wants_lse: ClassVar[bool] = False

    @property
    def queries(self) -> int:
        return 0

    @abstractmethod
    def first(self, layer: LayerState, scores: Scores) -> Targets:
        """Entries each row may keep in this layer, on the host: final, or an upper bound if deferred. May exceed the row.

        A list a row gives each head its own; only for a budget that is final at once and counts across heads.
        """

    def keeps_all(self, length: int) -> bool:
        """Whether every layer ends up with a whole row of `length` tokens; else some layer drops some (deferred budgets only)."""
        raise NotImplementedError(f"{type(self).__name__} is final at once")

    def measure(self, layer: LayerState, scores: Scores) -> Tensor:
        """What a layer shows of its needs, ``[batch, ...]`` on the device (deferred budgets only)."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing")

    def settle(
        self, measured: Sequence[Tensor], lengths: Sequence[int], *, floor: int, layers: int | None = None
    ) -> list[list[int]]:
        """Entries ``[measured][batch]`` from what the layers measured, final or upper bounds (deferred budgets only).

        Args:
            measured: one tensor ``[batch, ...]`` a layer, on the host; of the first layers only: bounds.
            lengths: real tokens of each row.
            floor: entries that the selection keeps in any case.
            layers: layers in all; None: as many as measured.
        """
        raise NotImplementedError(f"{type(self).__name__} is final at once")

    def settle_heads(
        self, measured: Sequence[Tensor], lengths: Sequence[int], *, floor: int, layers: int | None = None
    ) -> list[list[list[int]]]:
        """The same for each head, ``[layers][batch][heads]``, from tensors that are still on the device."""
        raise NotImplementedError(f"{type(self).__name__} gives all heads of a layer the same")


@dataclass(frozen=True)
class Uniform(Budget):
    """The same number (int) or the same share of its own prompt (float) for every layer and row."""

    budget: int | float

    def __post_init__(self) -> None:
        entries(self.budget, 1)

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        return [entries(self.budget, length) for length in layer.lengths]


@dataclass(frozen=True)
class Squeeze(Budget):
    """SqueezeAttention's layer budgets, per sequence: unimportant layers give most of theirs to the others.

    Attributes:
        budget: mean entries (int) or share of the prompt (float) a layer.
        p: share of it that the unimportant layers keep, in (0, 1].
        allocation: "exact" hands out ``layers * budget`` entries to the last one, and what a layer cannot use (its prompt is
            shorter) goes to the others; "official" truncates each layer and lets the surplus lie.
        groups: k-means clusters.
    """

    budget: int | float
    p: float = 0.35
    allocation: Literal["exact", "official"] = "exact"
    groups: int = 3
    deferred = True
    wants_residual = True

    def __post_init__(self) -> None:
        entries(self.budget, 1)
        if not 0 < self.p <= 1:
            raise ValueError(f"Squeeze: p must be in (0, 1], got {self.p}")
        if self.allocation not in ("exact", "official"):
            raise ValueError(f'Squeeze: allocation must be "exact" or "official", got {self.allocation!r}')
        if self.groups < 2:
            raise ValueError(f"Squeeze: groups must be at least 2, got {self.groups}")

    def _keep(self, length: int) -> float:
        return self.budget / length if isinstance(self.budget, int) else self.budget

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        """The most that any clustering can give one layer: every other important group is a single layer."""
        return [self._bound(n, layer.num_layers, layer.num_layers) for n in layer.lengths]

    def _bound(self, length: int, layers: int, unimportant: int) -> int:
        """The most that a layer gets which is not in the unimportant group, if that has so many layers at most."""
        n = max(min(unimportant, layers - self.groups + 1), 0)
        mean = max(self._keep(length) * length, entries(self.budget, length)) if length else 0
        return min(length, int(mean * (layers - n * self.p) / (layers - n)) + 1)

    def _bounds(self, cosines: list[float], length: int, layers: int) -> list[int]:
        """Of the measured layers. One that is important leaves to the group above it the layers of no lower cosine, and those to
        come; one that is not gets less than the mean.
        """
        to_come = layers - len(cosines)
        ranks = [sum(other >= own for other in cosines) - 1 for own in cosines]
        return [self._bound(length, layers, rank + to_come) for rank in ranks]

    def keeps_all(self, length: int) -> bool:
        return entries(self.budget, length) >= length

    def settle(
        self, measured: Sequence[Tensor], lengths: Sequence[int], *, floor: int, layers: int | None = None
    ) -> list[list[int]]:
        columns, layers = [], layers or len(measured)
        for row, length in enumerate(lengths):
            if entries(self.budget, length) >= length:  # nothing to hand around; a layer may still grow to its mean
                columns.append([max(entries(self.budget, length), floor)] * len(measured))
                continue
            cosines = [float(layer[row]) for layer in measured]
            if len(measured) < layers:
                columns.append([max(n, floor) for n in self._bounds(cosines, length, layers)])
                continue
            groups = kmeans_1d(cosines, self.groups) if length else None
            keep = self._keep(max(length, 1))
            ratios = squeeze_ratios(groups, layers, keep, self.p * keep)
            if self.allocation == "official":
                columns.append([max(int(ratio * length), floor) for ratio in ratios])
            else:
                total = layers * entries(self.budget, length)
                columns.append(allocate(total, ratios, floor=floor, cap=[length] * layers))
        return [list(row) for row in zip(*columns)]


@dataclass(frozen=True)
class Pyramid(Budget):
    """PyramidKV's layer budgets: a straight line from the first layer down to the last, known before any layer has run.

    With ``base = entries - window``: the last layer keeps ``base / beta`` entries and the window, the first one
    ``2 base - base / beta``, clipped to the prompt (the last then gets what keeps the mean at `base`).

    Attributes:
        budget: mean entries (int) or share of the prompt (float) a layer, window included.
        window: entries that every layer keeps beside its part of the line.
        beta: how far the last layer falls below the mean.
        allocation: "exact" hands out ``layers * budget`` entries, to the last one. "official" truncates the slope, so layers
            keep up to 27 % more than that in all, and knows a uniform case for prompts below ``2 base``. "kvpress" rounds each
            layer, counts the window into the line, and falls back to uniform budgets where the line leaves the prompt or
            the window. "adakv" is the official slope for prompts of any length.
    """

    budget: int | float
    window: int
    beta: int = 20
    allocation: Literal["exact", "official", "kvpress", "adakv"] = "exact"

    def __post_init__(self) -> None:
        entries(self.budget, 1)
        if self.window < 0:
            raise ValueError(f"Pyramid: window must be at least 0, got {self.window}")
        if self.beta < 1:
            raise ValueError(f"Pyramid: beta must be at least 1, got {self.beta}")
        if self.allocation not in self._rules:
            raise ValueError(
                f'Pyramid: allocation must be "exact", "official", "kvpress" or "adakv", got {self.allocation!r}'
            )

    @property
    def _rules(self) -> dict[str, Callable[[int, int], list[int]]]:
        return {"exact": self._exact, "official": self._official, "kvpress": self._kvpress, "adakv": self._adakv}

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        rule = self._rules[self.allocation]
        return [rule(layer.num_layers, length)[layer.index] for length in layer.lengths]

    def _exact(self, layers: int, length: int) -> list[int]:
        base = max(entries(self.budget, length) - self.window, 0)
        room = max(length - self.window, 0)
        high, low = _slope(base, base / self.beta, room)
        line = [high - layer * (high - low) / max(layers - 1, 1) for layer in range(layers)]
        return [n + self.window for n in allocate(layers * base, line, cap=[room] * layers)]

    def _official(self, layers: int, length: int) -> list[int]:
        capacity = entries(self.budget, length)
        base = max(capacity - self.window, 0)
        if length < capacity:
            return [length] * layers
        return [self.window + base] * layers if length < 2 * base else self._adakv(layers, length)

    def _adakv(self, layers: int, length: int) -> list[int]:
        base = max(entries(self.budget, length) - self.window, 0)
        high, low = _slope(base, base // self.beta, length - self.window)
        step = (high - low) // max(layers - 1, 1)
        return [self.window + int(high - layer * step) for layer in range(layers)]

    def _kvpress(self, layers: int, length: int) -> list[int]:
        mean = self.budget if isinstance(self.budget, int) else self.budget * length
        high, low = _slope(mean, mean / self.beta, length - self.window)
        if not length >= high >= low >= self.window:
            return [max(1, round(mean))] * layers
        return [round(high - layer * ((high - low) / max(layers - 1, 1))) for layer in range(layers)]


def _slope(mean: float, low: float, cap: float) -> tuple[float, float]:
    """Ends of a line of this mean: from `low`, or higher if the other end would pass `cap`."""
    high = 2 * mean - low
    return (cap, 2 * mean - cap) if high >= cap else (high, low)


@dataclass(frozen=True)
class ZigZag(Budget):
    """ZigZagKV's layer budgets, per sequence: in proportion to the entries a layer needs to keep most of its attention.

    For each query head, a(t) is the mean attention of the last `window` queries to entry t, the window's own included, and
    `mass_count` the entries that hold `tau` of it; u is the mean count over the heads. Layer l keeps
    ``beta b + (1 - beta) b L u_l / sum(u)`` entries for a mean of b, at most its prompt; what a short prompt leaves goes to
    the others by the same rule.

    Attributes:
        budget: mean entries (int) or share of the prompt (float) a layer.
        window: observing queries.
        tau: share of the attention to be held.
        beta: share of the budget that every layer keeps in any case, in [0, 1).
    """

    budget: int | float
    window: int = 32
    tau: float = 0.9
    beta: float = 0.2
    deferred = True
    wants_lse = True

    def __post_init__(self) -> None:
        entries(self.budget, 1)
        if self.window < 1:
            raise ValueError(f"ZigZag: window must be at least 1, got {self.window}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"ZigZag: tau must be in (0, 1], got {self.tau}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"ZigZag: beta must be in [0, 1), got {self.beta}")

    @property
    def queries(self) -> int:
        return self.window

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        """The most that any measurement can give one layer: it needs all entries, every other layer one."""
        bounds = []
        for n in layer.lengths:
            mean = entries(self.budget, n)
            most = n / max(n + layer.num_layers - 1, 1)
            bounds.append(min(n, int(mean * (self.beta + (1 - self.beta) * layer.num_layers * most)) + 1))
        return bounds

    def measure(self, layer: LayerState, scores: Scores) -> Tensor:
        """Mean over the query heads of the entries that hold `tau` of the attention, ``[batch]`` float64."""
        attention = ReceivedAttention(queries=self.window, group_reduce="none")(layer)
        return mass_count(attention, self.tau).double().mean(-1)

    def keeps_all(self, length: int) -> bool:
        return entries(self.budget, length) >= length

    def settle(
        self, measured: Sequence[Tensor], lengths: Sequence[int], *, floor: int, layers: int | None = None
    ) -> list[list[int]]:
        columns, layers = [], layers or len(measured)
        for row, length in enumerate(lengths):
            mean, to_come = entries(self.budget, length), layers - len(measured)
            needs = [float(layer[row]) for layer in measured]
            base, caps = self.beta * mean, [length] * len(measured)
            total = layers * mean - to_come * max(int(min(base, length)) - 1, 0)  # the others get their base at least
            split = allocate(total, needs, base=base, floor=floor, cap=caps)
            columns.append([min(n + 1, length) for n in split] if to_come else split)  # a remainder may still round up
        return [list(row) for row in zip(*columns)]


@dataclass(frozen=True)
class PrefixMass(Budget):
    """PrefixKV's layer budgets, per sequence: one share of the score mass, common to all layers, that fits the total.

    With each layer's scores in descending order, layer l keeps the shortest prefix that holds a share p of their sum, beside
    `forced` entries that stay whatever their score; p is such that all layers together keep ``layers * budget``, to the last
    entry. Layers whose scores are concentrated keep few.

    Attributes:
        budget: mean entries (int) or share of the prompt (float) a layer.
        forced: entries of the selection that no score decides.
    """

    budget: int | float
    forced: int = 0
    deferred = True
    needs_mass = True

    def __post_init__(self) -> None:
        entries(self.budget, 1)
        if self.forced < 0:
            raise ValueError(f"PrefixMass: forced must be at least 0, got {self.forced}")

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        """The most that any scores can give one layer: of the others, each prefix has one entry."""
        others = (layer.num_layers - 1) * (self.forced + 1)
        means = [entries(self.budget, n) for n in layer.lengths]
        return [min(n, max(mean, layer.num_layers * mean - others)) for n, mean in zip(layer.lengths, means)]

    def measure(self, layer: LayerState, scores: Scores) -> Tensor:
        """Sums of the largest scores, mean over the heads, ``[batch, seq_len]`` as `cumulative_mass` gives them."""
        return cumulative_mass(scores().mean(1))

    def keeps_all(self, length: int) -> bool:
        return entries(self.budget, length) >= length

    def settle(
        self, measured: Sequence[Tensor], lengths: Sequence[int], *, floor: int, layers: int | None = None
    ) -> list[list[int]]:
        columns, layers = [], layers or len(measured)
        for row, length in enumerate(lengths):
            total = layers * entries(self.budget, length)
            room = max(length - self.forced, 0)
            curves = [mass_before(layer[row], room) for layer in measured]
            free = min(max(total - layers * self.forced, 0), len(curves) * room)
            wanted = [n + self.forced for n in prefix_lengths(curves, free)]
            if len(measured) < layers:  # more layers only bring the common share down
                columns.append([min(max(n, floor), length) for n in wanted])
            else:
                columns.append(allocate(total, wanted, floor=floor, cap=[length] * layers))
        return [list(row) for row in zip(*columns)]


def mass_before(held: Tensor, entries: int) -> np.ndarray:
    """Share of a row's mass that stands before each of its first `entries` entries, from its `cumulative_mass`."""
    sums, before = held.numpy(), np.zeros(entries)
    np.divide(sums[: max(entries - 1, 0)], max(int(sums[-1]), 1), out=before[1:])
    return before


@dataclass(frozen=True)
class Table(Budget):
    """A share of the prompt for each layer, known from an earlier calibration.

    Layer l drops ``round(length * (1 - keep[l]))`` entries of a row, halves to even.

    Attributes:
        keep: share in (0, 1] of each layer.
    """

    keep: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.keep or not all(isinstance(share, int | float) and 0 < share <= 1 for share in self.keep):
            raise ValueError(f"Table: keep must be a share in (0, 1] for each layer, got {self.keep}")

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        if len(self.keep) != layer.num_layers:
            raise ValueError(
                f"Table: keep must have a share for each of {layer.num_layers} layers, got {len(self.keep)}"
            )
        drop = 1 - self.keep[layer.index]
        return [max(1, length - round(drop * length)) for length in layer.lengths]
