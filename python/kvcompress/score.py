"""Scores: how much does each stored entry matter?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from kvcompress import _check
from kvcompress.columns import GROUP_REDUCE, GroupReduce, column_sums
from kvcompress.layer import ALL_QUERIES, LayerState
from kvcompress.rotary import rerotate

__all__ = ["ReceivedAttention", "Recency", "WindowAttention", "window_scores"]

WindowReduce = Literal["sum", "mean", "max"]
Pool = Literal["none", "avg", "max"]

_WINDOW_REDUCE = {"sum": 0, "mean": 1, "max": 2}
_POOL = {"none": 0, "avg": 1, "max": 2}


def window_scores(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
    seq_start: Tensor | None = None,
    first_query: int | None = None,
    num_scored: int | None = None,
    window_reduce: WindowReduce = "sum",
    group_reduce: GroupReduce = "mean",
    pool: Pool = "none",
    kernel_size: int = 1,
    pool_first: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention that the observing queries pay to each key, reduced and pooled to one score an entry and head.

    ``P[b, h, i, j] = softmax over visible j of softmax_scale * <q[b, h, i], k[b, h // q_per_kv, j]>``, then
    ``vote[b, h, j] = window_reduce over i of P[b, h, i, j]``, times ``weights[b, h // q_per_kv, j]`` if given; the votes
    of the query heads of a kv head are reduced and pooled along j, in this order unless ``pool_first``. All float32;
    the map P is never written, so any window is cheap in memory: the last 32 queries (SnapKV), one (TOVA). For many queries, other statistics or
    queries at scattered positions see `column_sums`.

    Query row i sits at position ``first_query + i`` and sees the keys ``[seq_start[b], min(first_query + i, seq_len -
    1)]``. Rows before ``seq_start[b]`` are padding and do not count; the mean divides by the rows that are real, at
    least 1. Queries from beyond the prompt (``first_query >= seq_len``) see every key.

    NaN never vanishes: a NaN logit makes its query row NaN (with ``lse`` given: that column alone), as softmax does,
    and every score that this row or, by the pool, such a column takes part in.

    Args:
        q: ``[batch, num_q_heads, window, head_dim]`` float32, float16 or bfloat16, after RoPE; any strides with a
            contiguous last dimension. head_dim is a multiple of 8 up to 256.
        k: ``[batch, num_kv_heads, seq_len, head_dim]``, same dtype; num_kv_heads divides num_q_heads.
        lse: ``[batch, num_q_heads, window]`` float32, the natural log of the sum of exp of the scaled logits over the
            visible keys, as flash attention returns it; k is then read once instead of twice.
        weights: ``[batch, num_kv_heads, seq_len]`` float32, a factor for each vote (norms of values, for instance).
        seq_start: ``[batch]`` int32, first real entry of each row (left padding); None: no padding.
        first_query: position of the first query; None: ``seq_len - window``, the last queries of the prompt.
        num_scored: columns ``[seq_start, num_scored)`` are scored; None: those before ``first_query``.
        window_reduce: over the queries: "sum", "mean" or "max".
        group_reduce: over the query heads of a kv head: "mean", "max", "sum", or "none": keep num_q_heads rows.
        pool: "avg" divides by kernel_size everywhere, as if zeros lay outside the scored real columns; "max" ignores
            what lies outside; "none" ignores kernel_size.
        kernel_size: odd width of the pool.
        pool_first: pool each query head, then reduce the group.
        softmax_scale: None: ``head_dim ** -0.5``.

    Returns:
        ``[batch, num_kv_heads, seq_len]`` float32 (num_q_heads rows if nothing reduces the group): -inf before
        ``seq_start[b]`` (padding, never kept), scores up to ``num_scored``, +inf from there on (the observing window,
        always kept).

    Raises:
        ValueError, TypeError: ``window_scores: argument must be ..., got ...``.

    Scratch: ``4 * batch * num_heads * seq_len`` bytes, num_heads those of q if ``pool_first``, if nothing reduces the
    group or its maximum does, else those of k times the row groups of 256 query rows that a group makes; and at most
    ``max(8 * batch * num_q_heads * window, 2 MiB)`` for row statistics. On a CPU also up to 32 MiB a thread, for the
    exponentials of some query heads.

    Example:
        >>> q, k = torch.randn(1, 32, 16, 64), torch.randn(1, 8, 100, 64)
        >>> scores = kvcompress.window_scores(q, k, pool="max", kernel_size=7)
        >>> scores.shape, int(scores.isinf().sum())
        (torch.Size([1, 8, 100]), 128)
    """
    op = "window_scores"
    if first_query is None:
        first_query = k.shape[-2] - q.shape[-2] if q.dim() > 1 and k.dim() > 1 else 0
    if num_scored is None:
        num_scored = min(max(first_query, 0), k.shape[-2]) if k.dim() > 1 else 0
    if softmax_scale is None:
        softmax_scale = max(q.shape[-1], 1) ** -0.5 if q.dim() > 0 else 1.0
    return _check.call(
        torch.ops.kvcompress.window_scores.default,
        q,
        k,
        lse,
        weights,
        seq_start,
        first_query,
        num_scored,
        kernel_size,
        _check.code(op, "window_reduce", _WINDOW_REDUCE, window_reduce),
        _check.code(op, "group_reduce", GROUP_REDUCE, group_reduce),
        _check.code(op, "pool", _POOL, pool),
        softmax_scale,
        pool_first,
    )


@torch.library.register_fake("kvcompress::window_scores")
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    weights: Tensor | None,
    seq_start: Tensor | None,
    first_query: int,
    num_scored: int,
    kernel_size: int,
    window_reduce: int,
    group_reduce: int,
    pool: int,
    softmax_scale: float,
    pool_first: bool,
) -> Tensor:
    op = "window_scores"
    _check.attention_rows(op, q, k, lse, seq_start, first_query, softmax_scale)
    batch, num_q_heads = q.shape[:2]
    num_kv_heads, seq_len = k.shape[1:3]
    _check.companion(op, "weights", weights, "[batch, num_kv_heads, seq_len]", (batch, num_kv_heads, seq_len), q)
    _check.require(0 <= num_scored <= seq_len, op, "num_scored", f"from 0 to seq_len ({seq_len})", num_scored)
    _check.require(kernel_size >= 1 and kernel_size % 2 == 1, op, "kernel_size", "odd and at least 1", kernel_size)
    _check.require(0 <= window_reduce < 3, op, "window_reduce", "0 (sum), 1 (mean) or 2 (max)", window_reduce)
    _check.require(0 <= group_reduce < 4, op, "group_reduce", "0 (none), 1 (mean), 2 (max) or 3 (sum)", group_reduce)
    _check.require(0 <= pool < 3, op, "pool", "0 (none), 1 (avg) or 2 (max)", pool)
    heads = num_q_heads if group_reduce == 0 else num_kv_heads
    return q.new_empty((batch, heads, seq_len), dtype=torch.float32)


# --- what scores of keys and values share
#
# Torch's linear algebra on purpose, in float32 pieces of the cache: products with small matrices, norms and factorisations,
# which are its business and bound by reading K and V once or twice. That is Compactor's sketch, Gram matrices, Cholesky
# factors and attention inside chunks, CurDKV's row energies, the norms and anchors of Knorm and KeyDiff, Expected
# Attention's moments and quadratic forms, and OBCache's output of the observing queries. What would write a map of
# queries x keys instead is an op: `window_scores`, `column_sums`.

CHUNK = 1024  # entries that are widened to float32 at a time, where order of summation counts
_CHUNKS = (
    8  # pieces of a long row where it does not: a launch for each of 1024 entries costs the host more than the pass
)


def by_chunks(compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``compute(*tensors)`` entry by entry, `CHUNK` entries or an eighth at a time in float32: the cache is never widened as a whole.

    Args:
        compute: ``[batch, heads, n, ...]`` float32 tensors -> ``[batch, heads, n, ...]``.
        tensors: ``[batch, heads, seq_len, ...]``.
    """
    size = max(CHUNK, -(-tensors[0].shape[2] // _CHUNKS))
    parts = [compute(*(t.float() for t in part)) for part in zip(*(t.split(size, dim=2) for t in tensors))]
    return torch.cat(parts, dim=2)


def row_norms(x: Tensor) -> Tensor:
    """``|x[b, h, j]|`` ``[batch, heads, seq_len]`` float32 of keys or values."""
    return by_chunks(lambda part: torch.linalg.vector_norm(part, dim=-1), x)


S = TypeVar("S", bound=Callable[..., Tensor])


def row_by_row(score: S) -> S:
    """Lets a score that knows nothing of padding score padded batches, each row as if it were alone.

    Right by construction for any statistic over the sequence; a batch without padding is scored in one go.
    """

    @functools.wraps(score)
    def padded(self: Any, layer: LayerState) -> Tensor:
        if layer.seq_start is None:
            return score(self, layer)
        shape = (layer.keys.shape[0], layer.keys.shape[1], layer.seq_len)
        out = torch.full(shape, -torch.inf, dtype=torch.float32, device=layer.device)
        for b, length in enumerate(layer.lengths):
            if length > 0:
                out[b : b + 1, :, layer.seq_len - length :] = score(self, layer.row(b))
        return out

    return cast(S, padded)


_ROWS, _COLUMNS = 64, 2048  # queries and entries whose logits are held at a time


def attention_output(layer: LayerState, queries: Tensor) -> tuple[Tensor, Tensor]:
    """What the last prompt queries got from attention: the output before its projection, and the log-sum-exp of the logits.

    Torch's matrix products over blocks of ``64 x 2048`` logits a head, in float32, with a running softmax; K and V are widened
    one such block at a time.

    Args:
        queries: ``[batch, num_q_heads, n, head_dim]``, the last n of the prompt.

    Returns:
        Output like `queries` and rounded to their dtype, as the model's own attention returns it, 0 in the padding; and
        ``[batch, num_q_heads, n]`` float32, +inf there.
    """
    heads, seq_len = layer.keys.shape[1:3]
    n, column = queries.shape[2], torch.arange(layer.seq_len, device=layer.device)
    output, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:3], dtype=torch.float32)
    for first in range(0, n, _ROWS):
        rows = queries[:, :, first : first + _ROWS].unflatten(1, (heads, -1)).float() * layer.softmax_scale
        position = seq_len - n + first + torch.arange(rows.shape[3], device=layer.device)
        top = rows.new_full(rows.shape[:-1], -torch.inf)
        total, summed = torch.zeros_like(top), torch.zeros_like(rows)
        for start in range(0, seq_len - n + first + rows.shape[3], _COLUMNS):
            span = slice(start, start + _COLUMNS)
            hidden = column[span] > position[:, None]
            if layer.seq_start is not None:
                hidden = hidden | (column[span] < layer.seq_start[:, None, None, None, None])
            logits = rows @ layer.keys[:, :, span].float()[:, :, None].mT
            logits = logits.masked_fill_(hidden, -torch.inf)
            new_top = torch.maximum(top, logits.amax(-1))
            base = new_top.masked_fill(new_top.isneginf(), 0)  # a row that sees nothing yet
            weights, decay = logits.sub_(base[..., None]).exp_(), (top - base).exp()
            total = total * decay + weights.sum(-1)
            summed = summed * decay[..., None] + weights @ layer.values[:, :, span].float()[:, :, None]
            top = new_top
        block = slice(first, first + _ROWS)
        output[:, :, block] = (summed / total.clamp(min=1e-30)[..., None]).flatten(1, 2)
        lse[:, :, block] = (top + total.log()).masked_fill(total == 0, torch.inf).flatten(1, 2)
    return output, lse


def frequencies(layer: LayerState) -> Tensor:
    """The layer's rotary frequencies; ValueError where the model loop gave none."""
    if layer.inv_freq is None:
        raise ValueError("frequencies: inv_freq must be given for a score that takes rotations back, got None")
    return layer.inv_freq


def before_rope(layer: LayerState, rows: Tensor, first: int) -> Tensor:
    """Queries or keys of unpadded rows with their rotation taken back, ``[batch, heads, n, head_dim]`` float32.

    Args:
        layer: for its rotary frequencies.
        rows: ``[batch, heads, n, head_dim]``, the rotated entries ``first, first + 1, ...`` of each row.
        first: position of the first of them.
    """
    positions = torch.arange(first, first + rows.shape[2], device=rows.device)
    return rerotate(rows.float(), -positions, frequencies(layer))


def gaussian_sketch(rows: int, columns: int, seed: int) -> Tensor:
    """``[rows, columns]`` float32 of N(0, 1 / columns) on the host: the same numbers for every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * columns**-0.5


# --- score stages


@dataclass(frozen=True)
class WindowAttention:
    """`window_scores` of the last `window` prompt queries over the prefix, as a stage. See there for the parameters."""

    window: int
    window_reduce: WindowReduce = "sum"
    group_reduce: GroupReduce = "mean"
    pool: Pool = "none"
    kernel_size: int = 1
    pool_first: bool = False
    by_position = False
    is_mass = True
    wants_lse = True
    while_decoding = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"WindowAttention: window must be at least 1, got {self.window}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"WindowAttention: kernel_size must be odd and positive, got {self.kernel_size}")

    @property
    def queries(self) -> int:
        return self.window

    def __call__(self, layer: LayerState) -> Tensor:
        return window_scores(
            layer.window(self.window),
            layer.keys,
            lse=layer.window_lse(self.window),
            seq_start=layer.seq_start,
            window_reduce=self.window_reduce,
            group_reduce=self.group_reduce,
            pool=self.pool,
            kernel_size=self.kernel_size if self.pool != "none" else 1,
            pool_first=self.pool_first,
            softmax_scale=layer.softmax_scale,
        )

    def __str__(self) -> str:
        return f"attention of the last {self.window} prompt tokens"


@dataclass(frozen=True)
class Recency:
    """The position itself: later is better. Exact up to 2^24 positions, where float32 stops counting."""

    by_position = True
    queries = 0

    def __call__(self, layer: LayerState) -> Tensor:
        if layer.seq_len > 2**24:
            raise ValueError(f"Recency: seq_len must be at most {2**24}, got {layer.seq_len}")
        batch, heads = layer.keys.shape[:2]
        return torch.arange(layer.seq_len, dtype=torch.float32, device=layer.device).expand(batch, heads, -1)

    def __str__(self) -> str:
        return "position only"


@dataclass(frozen=True)
class ReceivedAttention:
    """Attention that every entry receives from the last `queries` prompt tokens, those tokens' own columns included.

    ``score(j) = reduce over heads of sum over queries i >= j of P[h, i, j]``: column sums of the causal attention map,
    which is never written. Entry j is seen by the queries at and behind it, so early entries collect from more of them.

    Attributes:
        queries: how many of the last prompt tokens look; all of them by default.
        group_reduce: over the query heads of a kv head: "mean", "max", "sum", or "none": one row a query head.
        per_viewer: divides by the number of queries that see the entry, ``min(queries, seq_len - j)``.
        shared: mean over all heads, so that every head of the layer ranks alike.
    """

    queries: int = ALL_QUERIES
    group_reduce: GroupReduce = "mean"
    per_viewer: bool = False
    shared: bool = False
    by_position = False
    is_mass = True
    wants_lse = True

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"ReceivedAttention: queries must be at least 1, got {self.queries}")
        if self.shared and self.group_reduce != "mean":
            raise ValueError(
                f'ReceivedAttention: group_reduce must be "mean" for heads that share a score, got "{self.group_reduce}"'
            )

    @property
    def while_decoding(self) -> bool:
        """Whether it can be asked again: with a few queries, and no count of those that saw an entry."""
        return self.queries != ALL_QUERIES and not self.per_viewer

    def __call__(self, layer: LayerState) -> Tensor:
        queries = layer.window(self.queries)
        scores = column_sums(
            queries,
            layer.keys,
            statistic="mean" if self.per_viewer else "sum",
            group_reduce=self.group_reduce,
            lse=layer.window_lse(self.queries),
            seq_start=layer.seq_start,
            softmax_scale=layer.softmax_scale,
        )
        # as many query heads stand behind every kv head, so the mean of their means is the mean over all
        return scores.mean(1, keepdim=True).expand_as(scores) if self.shared else scores

    def __str__(self) -> str:
        who = "all prompt tokens" if self.queries == ALL_QUERIES else f"the last {self.queries} prompt tokens"
        return f"attention received from {who}"
