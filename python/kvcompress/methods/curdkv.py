"""CurDKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcompress import budget, score, select
from kvcompress.heads import AdaptiveHeads
from kvcompress.layer import LayerState
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages

Combine = Literal["key", "value", "kv_avg", "kv_product"]
Pad = Literal["back", "front"]


@register("curdkv", title="CurDKV", paper="arXiv 2509.15038")
@dataclass(frozen=True)
class CurDKV(Method):
    """Keeps the entries that carry the row energy of K and V, so that the kept rows of V still represent V.

    ``kappa(j) = |k_j|^2`` and ``nu(j) = |v_j|^2`` (the paper's leverage scores), each divided by its sum over the entry's
    local window, combined, and divided by the sum over the sequence. Needs no queries. With `sketch`, the energies are
    those of ``K G`` and ``V G``, G Gaussian: cheaper to hold, equal in expectation. The first `sink` entries always stay.
    Once, at the end of a layer's prefill. In the first layer a token's energies do not depend on where it stands: occurrences of
    one token in a local window tie but for rounding.

    Departures from the authors' press and its merge NVIDIA/kvpress@8bb29b9 (CURPress):
        - left padding counts in no sum; local windows are counted from a row's own first or last entry.
        - sinks score +inf (official: 1, which a single heavy entry can reach), and a share below `sink` is raised to it.
        - float32 whatever the cache's dtype (kvpress fails on bfloat16 with the sketch).
        - the sketch comes from a seeded generator, the same for all layers and calls (official: a new one each call).
        - a window of zeros scores 0 (official: 0 / 0).
        - AdaCurDKV, `adaptive`, whose official code was not found, is kvpress's rule over these scores: one list of all
          heads' scores splits a layer, the heads' own best `adaptive` share of the mean staying in any case.

    Attributes:
        combine: "key", "value", "kv_avg" or "kv_product" (the paper's).
        local_window: entries that are normalised together; None: no local normalisation.
        pad: where the incomplete window lies: "back", windows start at the first entry (kvpress), or "front", they end at
            the last (the authors' first press).
        sketch: columns of G (paper: about 20); None: exact energies, as both official codes default to.
        sink: first entries, always kept.
        seed: of the sketch.
        adaptive: None: every head keeps `budget`; a share in [0, 1]: AdaCurDKV, heads keep what they win and at least that share of
            `budget` (0.2 as AdaKV), `budget` on average.
    """

    combine: Combine = "kv_product"
    local_window: int | None = 16
    pad: Pad = "back"
    sketch: int | None = None
    sink: int = 4
    seed: int = 0
    adaptive: float | None = None

    def stages(self) -> Stages:
        return Stages(
            heads=None if self.adaptive is None else AdaptiveHeads(self.adaptive, rounding="safeguard"),
            score=RowEnergy(self.combine, self.local_window, self.pad, self.sketch, self.sink, self.seed),
            budget=budget.Uniform(self.budget),
            select=select.TopK(sink=self.sink),
        )


@dataclass(frozen=True)
class RowEnergy:
    """Combined energies of the rows of K and V, normalised over local windows and over the sequence."""

    combine: Combine
    local_window: int | None
    pad: Pad
    sketch: int | None
    sink: int
    seed: int
    by_position = False
    is_mass = True
    queries = 0

    def __post_init__(self) -> None:
        if self.combine not in ("key", "value", "kv_avg", "kv_product"):
            raise ValueError(f'curdkv: combine must be "key", "value", "kv_avg" or "kv_product", got {self.combine!r}')
        if self.pad not in ("back", "front"):
            raise ValueError(f'curdkv: pad must be "back" or "front", got {self.pad!r}')
        for name in ("local_window", "sketch"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"curdkv: {name} must be at least 1 or None, got {size}")

    def projection(self, head_dim: int) -> Tensor | None:
        """G ``[head_dim, sketch]``, entries N(0, 1 / sketch), on the host; None: exact energies."""
        return None if self.sketch is None else score.gaussian_sketch(head_dim, self.sketch, self.seed)

    @score.row_by_row
    def __call__(self, layer: LayerState) -> Tensor:
        if self.combine == "key":
            combined = self._energy(layer.keys)
        elif self.combine == "value":
            combined = self._energy(layer.values)
        elif self.combine == "kv_avg":
            combined = (self._energy(layer.keys) + self._energy(layer.values)) / 2
        else:
            combined = self._energy(layer.keys) * self._energy(layer.values)
        scores = _share(combined)
        scores[:, :, : self.sink] = torch.inf
        return scores

    def _energy(self, rows: Tensor) -> Tensor:
        g = self.projection(rows.shape[-1])
        if g is None:
            energy = score.by_chunks(lambda part: part.square().sum(-1), rows)
        else:
            g = g.to(rows.device)
            energy = score.by_chunks(lambda part: (part @ g).square().sum(-1), rows)
        return energy if self.local_window is None else self._local(energy, self.local_window)

    def _local(self, energy: Tensor, width: int) -> Tensor:
        length = energy.shape[2]
        missing = -length % width
        front = missing if self.pad == "front" else 0
        windows = pad(energy, (front, missing - front)).unflatten(2, (-1, width))
        return _share(windows).flatten(2)[:, :, front : front + length]

    def __str__(self) -> str:
        return "row energies of keys and values"


def _share(x: Tensor) -> Tensor:
    """x divided by its sum over the last dimension; 0 where that is 0."""
    total = x.sum(-1, keepdim=True)
    return x / total.masked_fill(total == 0, 1)
