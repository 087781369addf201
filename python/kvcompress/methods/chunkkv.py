"""ChunkKV."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcompress.layer import LayerState
from kvcompress.methods import Method, create, inner_stages, register
from kvcompress.pipeline import Score, Stages, is_mass


@dataclass(frozen=True)
class Chunks:
    """Scores of chunks in place of those of entries: every entry gets the mean over its chunk of another score.

    A row's chunks start at its first real entry; the last one may be shorter and has the mean of what it holds. Equal scores
    go to the smaller position, so any selection by score takes whole chunks, best first, and cuts the last one it takes
    behind its front. A row shorter than one chunk keeps its own scores. A chunk that touches an entry at +inf is at +inf.

    Attributes:
        inner: the score of the entries.
        chunk: entries of a chunk.
        per_kv_head: chunks of each head by its own scores; otherwise by the sum over the heads, the same for all.
    """

    inner: Score
    chunk: int
    per_kv_head: bool = False
    by_position = False

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"Chunks: chunk must be at least 1, got {self.chunk}")

    @property
    def queries(self) -> int:
        return self.inner.queries

    @property
    def is_mass(self) -> bool:
        return is_mass(self.inner)

    @property
    def wants_lse(self) -> bool:
        return getattr(self.inner, "wants_lse", False)

    @property
    def wants_output(self) -> bool:
        return getattr(self.inner, "wants_output", False)

    def __call__(self, layer: LayerState) -> Tensor:
        scores = self.inner(layer)
        rows = scores if self.per_kv_head else scores.sum(1, keepdim=True)
        lengths = torch.tensor(layer.lengths, device=scores.device)[:, None, None]
        column, start = torch.arange(layer.seq_len, device=scores.device), layer.seq_len - lengths
        if layer.seq_start is not None:  # every row's first real entry to the front
            front = (column + start).clamp(max=layer.seq_len - 1).expand_as(rows)
            rows = rows.gather(-1, front)
        rows = torch.where(column < lengths, rows, 0).double()  # so that no order of summation shows in float32
        sums = pad(rows, (0, -layer.seq_len % self.chunk)).unflatten(-1, (-1, self.chunk)).sum(-1)
        first = self.chunk * torch.arange(sums.shape[-1], device=scores.device)
        means = (sums / (lengths - first).clamp(1, self.chunk)).float()
        chunked = means.repeat_interleave(self.chunk, -1)[..., : layer.seq_len]
        if layer.seq_start is not None:
            back = (column - start).clamp(min=0).expand_as(chunked)
            chunked = chunked.gather(-1, back).masked_fill(column < start, -torch.inf)
        return torch.where(lengths < self.chunk, scores, chunked)

    def __str__(self) -> str:
        return f"{self.inner}, mean over chunks of {self.chunk}"


@register("chunkkv", title="ChunkKV", paper="arXiv 2502.00299")
@dataclass(frozen=True)
class ChunkKV(Method):
    """Keeps or drops whole chunks of `chunk` consecutive entries, so that phrases are not torn apart.

    ``score(chunk) = mean over its entries of the sum over kv heads of the entry's score``, the attention of the last `window`
    prompt tokens unless another method is given; the best chunks stay, for all heads alike, and the window. Groups of
    `reuse` layers rank by the scores of their first layer: with equal budgets they keep the same entries, and only one of
    them pays for the scores.

    Departures from NVIDIA/kvpress@8bb29b9 (ChunkKVPress, which the paper names as its code):
        - the budget is met exactly: the last chunk taken may be cut (there: whole chunks, as many as ``1 - ratio`` of them).
        - per sequence of a batch (there: the choice of row 0 for all), padding masked, chunks start at a row's first token.
        - `reuse` is the paper's; no published code has it.
        - equal chunks go to the smaller position.

    Attributes:
        chunk: entries of a chunk.
        window: observing queries, always kept; unused if `inner` is given.
        inner: a method whose score is taken, by name or built; its own budget is replaced.
        reuse: layers that share one choice; 1: none, 2: the paper's.
        per_kv_head: each kv head chooses for itself.
    """

    chunk: int = 10
    window: int = 32
    inner: Method | str | None = None
    reuse: int = 1
    per_kv_head: bool = False

    def stages(self) -> Stages:
        inner = (
            create("snapkv", budget=self.budget, window=self.window, pool="none") if self.inner is None else self.inner
        )
        stages = inner_stages(self.name, inner, self.budget)
        return replace(stages, score=Chunks(stages.score, self.chunk, self.per_kv_head), reuse=self.reuse)
