"""BaKlaVa-like budgets."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from kvcompress.budget import Budget, Scores, Targets, allocate, entries
from kvcompress.layer import LayerState
from kvcompress.methods import Method, inner_stages, register
from kvcompress.pipeline import Stages

__all__ = ["BaklavaLike", "CacheTable"]

_FORMAT = "kvcompress cache table 1"


@dataclass(frozen=True)
class CacheTable:
    """How much each cache, one a layer and kv head, matters: measured once for a model by `kvcompress calibrate`.

    A cache of weight w keeps ``beta * mean + (1 - beta) * mean * N * w^gamma / sum(w^gamma)`` of the mean entries of all N.

    Attributes:
        importance: ``[layers][kv heads]``, not negative.
        gamma: 0 gives all caches the same, more sharpens.
        beta: share of the mean that every cache keeps in any case, in [0, 1].
    """

    importance: tuple[tuple[float, ...], ...]
    gamma: float = 1.0
    beta: float = 0.25

    def __post_init__(self) -> None:
        heads = {len(row) for row in self.importance}
        if not self.importance or len(heads) != 1 or heads == {0}:
            raise ValueError(f"CacheTable: importance must be [layers][kv heads], got rows of {sorted(heads)} numbers")
        if not all(0 <= w < float("inf") for row in self.importance for w in row):
            raise ValueError("CacheTable: importance must be finite and at least 0, got other numbers")
        if not 0 <= self.gamma < float("inf"):
            raise ValueError(f"CacheTable: gamma must be finite and at least 0, got {self.gamma}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"CacheTable: beta must be in [0, 1], got {self.beta}")

    @property
    def num_layers(self) -> int:
        return len(self.importance)

    @property
    def num_kv_heads(self) -> int:
        return len(self.importance[0])

    def budgets(self, mean: int, length: int, *, floor: int = 0) -> list[list[int]]:
        """Entries ``[layers][kv heads]`` of a prompt of `length` tokens; they sum to ``layers * kv heads * min(mean, length)``.

        Caches are capped at `length`, the surplus goes to the others by the same weights; fractions to the largest remainders,
        ties to the lower (layer, head).
        """
        weights = [w**self.gamma for row in self.importance for w in row]
        count, mean = len(weights), min(mean, length)
        flat = allocate(count * mean, weights, base=self.beta * mean, floor=min(floor, mean), cap=[length] * count)
        return [flat[i : i + self.num_kv_heads] for i in range(0, count, self.num_kv_heads)]

    def save(self, path: str | PathLike[str], **about: Any) -> None:
        """Writes the table, and what is known about it, as JSON that `load` reads."""
        table = {"format": _FORMAT, "gamma": self.gamma, "beta": self.beta, "importance": self.importance, **about}
        Path(path).write_text(json.dumps(table, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CacheTable:
        """Reads a table that `save` wrote. Raises ValueError for another file."""
        try:
            table = json.loads(Path(path).read_text())
            if table["format"] != _FORMAT:
                raise ValueError(f'format "{table["format"]}"')
            rows = tuple(tuple(float(w) for w in row) for row in table["importance"])
            return cls(rows, float(table["gamma"]), float(table["beta"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"CacheTable: path must be a file of `kvcompress calibrate` ({_FORMAT}), got {path} ({error})"
            ) from None


@dataclass(frozen=True)
class TableBudget(Budget):
    """Entries for each layer and kv head from a `CacheTable`, known before the prompt is read; None: the same for all."""

    budget: int | float
    table: CacheTable | None
    forced: int
    across_heads = True

    def __post_init__(self) -> None:
        entries(self.budget, 1)

    def first(self, layer: LayerState, scores: Scores) -> Targets:
        heads = layer.keys.shape[1]
        table = self.table
        if table is None:
            table = CacheTable(((1.0,) * heads,) * layer.num_layers)
        if (table.num_layers, table.num_kv_heads) != (layer.num_layers, heads):
            raise ValueError(
                f"baklava_like: table must be of a model with {layer.num_layers} layers and {heads} kv heads, got "
                f"{table.num_layers} and {table.num_kv_heads}"
            )
        return [_rows(table, entries(self.budget, n), n, self.forced)[layer.index] for n in layer.lengths]


@functools.lru_cache(maxsize=64)  # one split serves all layers of a prompt
def _rows(table: CacheTable, mean: int, length: int, floor: int) -> list[list[int]]:
    return table.budgets(mean, length, floor=floor)


@register("baklava_like", title="BaKlaVa-like", paper="after arXiv 2502.13176")
@dataclass(frozen=True)
class BaklavaLike(Method):
    """Constant budgets for each layer and kv head, from how much a head changes its input, measured once for a model.

    Only the abstract and summaries of BaKlaVa were at hand: a profile of each head's change, combined over the query heads of
    a kv head, mapped to budgets under one total, with parameters searched by perplexity. What exactly is compared, averaged
    and mapped is not established, so this is a definition of our own in its spirit, and no figure of the paper is claimed.

    Offline, `kvcompress calibrate --method baklava_like`: with v a token's own value and o its attention output before the
    projection, ``e[l, h] = mean over tokens t >= 1 of 1 - cos(v[t], o[t])``, mean over the query heads of kv head k; then
    ``w[l, k] = e[l, k]^gamma``, times a layer factor if asked for. Cache (l, k) keeps ``beta B + (1 - beta) B N w / sum(w)`` of
    the mean B of all N caches, capped at the prompt, exact in total. gamma and beta are searched on held-out text; gamma 0 is
    the uniform budget. At run time nothing is measured: each layer is cut once, ragged, at the end of its own prefill, so the
    peak is one layer's full K and V beside the compressed rest. Inside a cache the `inner` method ranks.

    Attributes:
        budget: mean entries a cache.
        table: path of the JSON file, or a `CacheTable`; None: all caches alike, the table of gamma 0.
        inner: the method that ranks inside a cache, by name or built; its own budget is replaced.
    """

    table: str | CacheTable | None = None
    inner: Method | str = "snapkv"

    def stages(self) -> Stages:
        stages = inner_stages(self.name, self.inner, self.budget)
        table = CacheTable.load(self.table) if isinstance(self.table, str) else self.table
        return replace(stages, budget=TableBudget(self.budget, table, stages.select.forced))
