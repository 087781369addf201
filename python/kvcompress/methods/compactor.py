"""Compactor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvcompress import score, select
from kvcompress.budget import Budget, Scores, Uniform, entries
from kvcompress.heads import counts_in_global_top
from kvcompress.layer import ALL_QUERIES, LayerState
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages

Tail = Literal["exact", "official", "kvpress"]
Protected = Literal["scored", "unscored"]
Accounting = Literal["outside", "inside", "official"]


@register("compactor", title="Compactor", paper="arXiv 2507.08143")
@dataclass(frozen=True)
class Compactor(Method):
    """Keeps keys that are geometrically irreplaceable or that anything nearby would attend to; knows no question.

    ``score = z(a) + blend * z(leverage)``. Leverage: keys before RoPE, sketched to ``X = K Phi``, centred in blocks;
    ``x_j . (X^T X + regulariser I)^-1 x_j``. Attention a: column sums of softmax(q k) inside chunks without a causal mask and
    without ``1 / sqrt(d)``, summed over the query heads of a kv head. z-scores are over all heads: of a block for leverage, of the
    prompt for attention. The first `sink` and last `window` entries always stay. Once, at the end of a layer's prefill.
    The paper's budgets by context are `kvcompress.calibrated.Calibrated`, which goes with any method's stages.

    Departures from vnchari/compactor-vllm@8bbac3a:
        - protected entries are beside the quota (official: they use it up, and lose some of themselves if it is small; ours
          stay in any case).
        - equal budgets for the heads, which is the paper's other selection; ``heads="layer"`` is the official one.
        - sketch in float32 and the factorisation in float64, by Cholesky (official: model dtype, SVD with two retries).
        - a spread below 1e-6 divides as 1e-6: equal entries score 0 (official: 0 / 0 in a block of one token).
        - a short last chunk is exact (`tail`); keys before RoPE are the cached keys turned back.

    Attributes:
        budget: an int counts all kept entries; a float is a share, see `accounting`.
        sketch: columns of Phi, one for all layers and heads.
        leverage_block: entries that are compared for leverage; None: the whole prompt (paper, kvpress).
        regulariser: on the diagonal of the Gram matrix (kvpress: 0.01).
        blend: weight of leverage (official engine: 0.5, kvpress: the share dropped).
        chunk: entries that attend to each other (official engine: 128).
        logit_scale: factor of the logits; None: that of the model.
        value_norm: attention times the norm of the value (kvpress).
        kernel_size: odd width of an average over neighbours, zeros outside (kvpress: 3); 1: none.
        tail: what a short last chunk sees: "exact", its own entries; "official", the same and a constant from the padded rows
            of a 64-row tile; "kvpress", zero keys and zero queries up to a whole chunk.
        protected: "scored" with the rest (official) or "unscored": left out of all statistics (kvpress).
        accounting: a share is of the unprotected entries, the protected ones come on top ("outside"), or of all ("inside"),
            or of the unprotected ones and includes the protected ones ("official").
        heads: "equal": every head keeps the same; "layer": the best of all heads of a layer.
        page_size: with ``heads="layer"``, each head is filled up to a multiple of it with its next best entries.
        seed: of the sketch.
    """

    sketch: int = 48
    leverage_block: int | None = 512
    regulariser: float = 5e-3
    blend: float = 0.3
    chunk: int = 256
    logit_scale: float | None = 1.0
    value_norm: bool = False
    kernel_size: int = 1
    tail: Tail = "exact"
    protected: Protected = "scored"
    sink: int = 16
    window: int = 64
    accounting: Accounting = "outside"
    heads: Literal["equal", "layer"] = "equal"
    page_size: int = 1
    seed: int = 0

    def stages(self) -> Stages:
        if self.accounting not in ("outside", "inside", "official"):
            raise ValueError(
                f'compactor: accounting must be "outside", "inside" or "official", got {self.accounting!r}'
            )
        if self.heads not in ("equal", "layer"):
            raise ValueError(f'compactor: heads must be "equal" or "layer", got {self.heads!r}')
        if self.page_size < 1 or (self.page_size > 1 and self.heads == "equal"):
            raise ValueError(
                f'compactor: page_size must be at least 1, and 1 unless heads is "layer", got {self.page_size}'
            )
        protected = self.sink + self.window
        budget: Budget = Uniform(self.budget)
        if isinstance(self.budget, float) and self.accounting != "inside":
            budget = BesideProtected(self.budget, protected, is_inside=self.accounting == "official")
        share = self.budget if isinstance(self.budget, float) and self.accounting == "official" else None
        return Stages(
            heads=BestOfLayer(share, protected, self.page_size) if self.heads == "layer" else None,
            score=LeverageAndAttention(
                self.sketch, self.leverage_block, self.regulariser, self.blend, self.chunk, self.logit_scale, self.value_norm,
                self.kernel_size, self.tail, self.protected, self.sink, self.window, self.seed,
            ),
            budget=budget,
            select=select.TopK(sink=self.sink, window=self.window),
        )  # fmt: skip


@dataclass(frozen=True)
class BesideProtected(Budget):
    """A share of the entries that are not protected, and the protected ones: beside that share, or inside it."""

    share: float
    protected: int
    is_inside: bool = False

    def __post_init__(self) -> None:
        entries(self.share, 1)

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        forced = [min(n, self.protected) for n in layer.lengths]
        shares = [entries(self.share, max(0, n - self.protected)) for n in layer.lengths]
        return [max(k, n) if self.is_inside else k + n for k, n in zip(forced, shares)]


@dataclass(frozen=True)
class BestOfLayer:
    """The best scores of all heads of a layer in one list, beside the forced entries of each head.

    Attributes:
        share: a row of n entries keeps ``max(1, round(share * (n - protected) * heads))``, the forced ones included (official);
            None: `heads` times the layer's count.
        protected: forced entries of each head.
        page_size: heads are filled up to a multiple of it.
    """

    share: float | None
    protected: int
    page_size: int

    @property
    def is_exact(self) -> bool:
        return self.share is None and self.page_size == 1

    @property
    def is_exact_bound(self) -> bool:
        return self.is_exact

    @property
    def is_nested(self) -> bool:
        return True

    def __call__(self, scores: Tensor, counts: Sequence[int], *, layer: int = 0) -> Tensor:
        heads = scores.shape[1]
        real = (scores > -torch.inf).sum(-1)
        totals = [heads * n for n in counts]
        if self.share is not None:
            lengths = real[:, 0].tolist()
            wanted = [max(1, round(self.share * (n - self.protected) * heads)) for n in lengths]
            totals = [max(total, heads * min(n, self.protected)) for total, n in zip(wanted, lengths)]
        pages = -(-counts_in_global_top(scores, totals) // self.page_size)
        return (pages * self.page_size).minimum(real).int()

    def bound(self, scores: Tensor, counts: Sequence[int], *, layer: int = 0) -> Tensor:
        """Winners of fewer are winners of more."""
        return self(scores, counts, layer=layer)


@dataclass(frozen=True)
class LeverageAndAttention:
    """z-scored chunk attention plus `blend` times z-scored leverage; see `Compactor` for the parameters."""

    sketch: int
    leverage_block: int | None
    regulariser: float
    blend: float
    chunk: int
    logit_scale: float | None
    value_norm: bool
    kernel_size: int
    tail: Tail
    protected: Protected
    sink: int
    window: int
    seed: int
    by_position = False
    queries = ALL_QUERIES

    def __post_init__(self) -> None:
        for name in ("sketch", "leverage_block", "chunk", "kernel_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"compactor: {name} must be at least 1, got {size}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"compactor: kernel_size must be odd, got {self.kernel_size}")
        if not self.regulariser > 0:
            raise ValueError(f"compactor: regulariser must be above 0, got {self.regulariser}")
        if self.tail not in ("exact", "official", "kvpress"):
            raise ValueError(f'compactor: tail must be "exact", "official" or "kvpress", got {self.tail!r}')
        if self.protected not in ("scored", "unscored"):
            raise ValueError(f'compactor: protected must be "scored" or "unscored", got {self.protected!r}')

    def projection(self, head_dim: int) -> Tensor:
        """Phi ``[head_dim, sketch]``, entries N(0, 1 / sketch), on the host."""
        return score.gaussian_sketch(head_dim, self.sketch, self.seed)

    @score.row_by_row
    def __call__(self, layer: LayerState) -> Tensor:
        batch, heads, length, _ = layer.keys.shape
        scores = torch.full((batch, heads, length), torch.inf, dtype=torch.float32, device=layer.device)
        first, last = self.scored(length)
        if length > self.sink + self.window:
            attention, leverage = self.attention(layer), self.leverage(layer)
            blocks = leverage.split(self.leverage_block or length, dim=2)
            leverage = torch.cat([standardised(block) for block in blocks], dim=2)
            scores[:, :, first:last] = standardised(attention) + self.blend * leverage
            scores[:, :, : self.sink] = torch.inf
            scores[:, :, length - self.window :] = torch.inf
        return scores

    def scored(self, length: int) -> tuple[int, int]:
        """The span of entries that are scored."""
        return (self.sink, length - self.window) if self.protected == "unscored" else (0, length)

    def leverage(self, layer: LayerState) -> Tensor:
        """Leverage ``[batch, num_kv_heads, scored]`` of unpadded rows, before its z-score.

        Scratch: the sketch of a block, or of `score.CHUNK` entries if that is more.
        """
        first, last = self.scored(layer.seq_len)
        keys = layer.keys[:, :, first:last]
        phi = self.projection(keys.shape[-1]).to(keys.device)
        out = []
        for start, stop, width in spans(last - first, self.leverage_block or last - first):
            pieces = range(start, stop, score.CHUNK)
            x = torch.cat(
                [
                    score.before_rope(layer, keys[:, :, i : min(i + score.CHUNK, stop)], first + i)
                    @ phi  # [B, H, n, sketch]
                    for i in pieces
                ],
                dim=2,
            )
            x = x.unflatten(
                2, (-1, width)
            ).double()  # few columns; float32 Gram matrices can lose their smallest directions
            x = x - x.mean(3, keepdim=True)
            gram = x.mT @ x
            gram.diagonal(dim1=-2, dim2=-1).add_(self.regulariser)
            factor, _ = torch.linalg.cholesky_ex(gram)
            solved = torch.linalg.solve_triangular(factor, x.mT, upper=False)
            out.append(solved.square().sum(-2).flatten(2).float())
        return torch.cat(out, dim=2)

    def attention(self, layer: LayerState) -> Tensor:
        """Chunk attention ``[batch, num_kv_heads, scored]`` of unpadded rows, before its z-score.

        Scratch: ``4 * batch * num_q_heads * max(chunk, score.CHUNK) * chunk`` bytes, twice.
        """
        first, last = self.scored(layer.seq_len)
        queries, keys = layer.window(ALL_QUERIES), layer.keys[:, :, first:last]
        if queries.shape[2] != layer.seq_len:
            raise ValueError(
                f"compactor: queries must be those of the whole prompt ({layer.seq_len}), got {queries.shape[2]}"
            )
        queries = queries[:, :, first:last].unflatten(1, (keys.shape[1], -1))
        scale = layer.softmax_scale if self.logit_scale is None else self.logit_scale
        out = []
        for start, stop, width in spans(last - first, self.chunk):
            q = queries[:, :, :, start:stop].unflatten(3, (-1, width)).float()  # [B, H, q_per_kv, chunks, width, D]
            k = keys[:, :, start:stop].unflatten(2, (-1, width)).float()[:, :, None]
            logits = q @ k.mT * scale
            missing = self.chunk - width
            if missing and self.tail == "kvpress":
                share = (logits - _logsumexp_with_zeros(logits, missing)).exp()
            else:
                share = logits.softmax(-1)
            received = share.sum((2, 4)).flatten(2)
            if missing and self.tail != "exact":  # rows that pad the queries spread evenly over a chunk
                received += q.shape[2] * (missing if self.tail == "kvpress" else -width % 64) / self.chunk
            out.append(received)
        received = torch.cat(out, dim=2)
        if self.value_norm:
            received = received * score.row_norms(layer.values[:, :, first:last])
        return avg_pool1d(received, self.kernel_size, stride=1, padding=self.kernel_size // 2)

    def __str__(self) -> str:
        return f"leverage of the keys and attention inside chunks of {self.chunk}"


def spans(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, width): as many whole blocks of `size` as fit `score.CHUNK` at a time, then the short last one."""
    whole = length - length % size
    step = max(1, score.CHUNK // size) * size
    for start in range(0, whole, step):
        yield start, min(start + step, whole), size
    if whole < length:
        yield whole, length, length - whole


def standardised(x: Tensor) -> Tensor:
    """z-score over heads and entries, population spread; 0 where all are equal."""
    spread, mean = torch.std_mean(x, dim=(1, 2), correction=0, keepdim=True)
    return (x - mean) / spread.clamp_min(1e-6)


def _logsumexp_with_zeros(logits: Tensor, zeros: int) -> Tensor:
    """Over the last dimension, as if `zeros` logits of 0 stood beside it."""
    beside = logits.new_full((), zeros).log()
    return torch.logaddexp(logits.logsumexp(-1, keepdim=True), beside)
