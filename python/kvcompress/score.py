"""Scores: how much does each stored entry matter?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from kvcompress import _check
from kvcompress.layer import ALL_QUERIES, LayerState
from kvcompress.rotary import rerotate

__all__ = ["ReceivedAttention", "Recency", "WindowAttention", "window_scores"]

WindowReduce = Literal["sum", "mean", "max"]
GroupReduce = Literal["none", "mean", "max", "sum"]
Pool = Literal["none", "avg", "max"]

_WINDOW_REDUCE = {"sum": 0, "mean": 1, "max": 2}
_GROUP_REDUCE = {"none": 0, "mean": 1, "max": 2, "sum": 3}
_POOL = {"none": 0, "avg": 1, "max": 2}


def _code(op: str, argument: str, codes: dict[str, int], name: str) -> int:
    if name not in codes:
        *most, last = (f'"{known}"' for known in codes)
        raise ValueError(f"{op}: {argument} must be {', '.join(most)} or {last}, got {name!r}")
    return codes[name]


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
    the map P is never written, so any window is cheap in memory: the last 32 queries (SnapKV), one (TOVA), or all,
    with ``first_query=0, num_scored=seq_len`` (column sums: H2O).

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

    Scratch: ``4 * batch * num_heads * seq_len`` bytes, num_heads those of q if ``pool_first`` or nothing reduces the
    group, else those of k; and at most ``max(8 * batch * num_q_heads * window, 2 MiB)`` for row statistics.

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
        _code(op, "window_reduce", _WINDOW_REDUCE, window_reduce),
        _code(op, "group_reduce", _GROUP_REDUCE, group_reduce),
        _code(op, "pool", _POOL, pool),
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
    _check.rank(op, "q", q, 4, "[batch, num_q_heads, window, head_dim]")
    _check.rank(op, "k", k, 4, "[batch, num_kv_heads, seq_len, head_dim]")
    _check.float_dtype(op, "q", q)
    _check.same_dtype(op, "k", k, q, "q")
    _check.same_device(op, "k", k, q, "q")
    batch, num_q_heads, window, head_dim = q.shape
    _, num_kv_heads, seq_len, _ = k.shape
    _check.require(k.shape[0] == batch, op, "k", f"of the batch of q ({batch})", k.shape[0])
    _check.require(k.shape[3] == head_dim, op, "k", f"of the head_dim of q ({head_dim})", k.shape[3])
    ok = 8 <= head_dim <= 256 and head_dim % 8 == 0
    _check.require(ok, op, "head_dim", "a multiple of 8 from 8 to 256", head_dim)
    _check.require(num_kv_heads >= 1, op, "num_kv_heads", "at least 1", num_kv_heads)
    ok = num_q_heads >= 1 and num_q_heads % num_kv_heads == 0
    _check.require(ok, op, "num_q_heads", f"a multiple of num_kv_heads ({num_kv_heads})", num_q_heads)
    _check.require(window >= 1, op, "window", "at least 1", window)
    _check.last_contiguous(op, "q", q)
    _check.last_contiguous(op, "k", k)
    _companion(op, "lse", lse, "[batch, num_q_heads, window]", (batch, num_q_heads, window), q)
    _companion(op, "weights", weights, "[batch, num_kv_heads, seq_len]", (batch, num_kv_heads, seq_len), q)
    _check.row_vector(op, "seq_start", seq_start, batch, q, "q")
    _check.require(first_query >= 0, op, "first_query", "at least 0", first_query)
    _check.require(0 <= num_scored <= seq_len, op, "num_scored", f"from 0 to seq_len ({seq_len})", num_scored)
    _check.require(kernel_size >= 1 and kernel_size % 2 == 1, op, "kernel_size", "odd and at least 1", kernel_size)
    _check.require(0 <= window_reduce < 3, op, "window_reduce", "0 (sum), 1 (mean) or 2 (max)", window_reduce)
    _check.require(0 <= group_reduce < 4, op, "group_reduce", "0 (none), 1 (mean), 2 (max) or 3 (sum)", group_reduce)
    _check.require(0 <= pool < 3, op, "pool", "0 (none), 1 (avg) or 2 (max)", pool)
    ok = 0 < softmax_scale < float("inf")
    _check.require(ok, op, "softmax_scale", "finite and above 0", f"{softmax_scale:f}")
    heads = num_q_heads if group_reduce == 0 else num_kv_heads
    return q.new_empty((batch, heads, seq_len), dtype=torch.float32)


def _companion(op: str, argument: str, t: Tensor | None, layout: str, shape: tuple[int, ...], q: Tensor) -> None:
    """The whole check of an optional float32 companion of q or k."""
    if t is None:
        return
    ok = t.dim() == len(shape) and all(size == wanted for size, wanted in zip(t.shape, shape))
    must = f"{layout} [{', '.join(str(size) for size in shape)}]"
    _check.require(ok, op, argument, must, f"{t.dim()}D {_check.shape_string(t)}")
    _check.dtype(op, argument, t, torch.float32)
    _check.same_device(op, argument, t, q, "q")
    _check.last_contiguous(op, argument, t)


# --- what scores of keys and values share

CHUNK = 1024  # entries that are widened to float32 at a time


def by_chunks(compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``compute(*tensors)`` entry by entry, `CHUNK` entries at a time in float32: the cache is never widened as a whole.

    Args:
        compute: ``[batch, heads, n, ...]`` float32 tensors -> ``[batch, heads, n, ...]``.
        tensors: ``[batch, heads, seq_len, ...]``.
    """
    parts = [compute(*(t.float() for t in part)) for part in zip(*(t.split(CHUNK, dim=2) for t in tensors))]
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
            lse=None if layer.lse is None else layer.lse[:, :, -self.window :],
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
        queries, seq_len = layer.window(self.queries), layer.seq_len
        window = queries.shape[2]
        scores = window_scores(
            queries,
            layer.keys,
            lse=None if layer.lse is None else layer.lse[:, :, -window:],
            seq_start=layer.seq_start,
            first_query=seq_len - window,
            num_scored=seq_len,
            group_reduce=self.group_reduce,
            softmax_scale=layer.softmax_scale,
        )
        if self.per_viewer:
            scores = scores / torch.arange(seq_len, 0, -1, device=scores.device).clamp(max=window)
        # as many query heads stand behind every kv head, so the mean of their means is the mean over all
        return scores.mean(1, keepdim=True).expand_as(scores) if self.shared else scores

    def __str__(self) -> str:
        who = "all prompt tokens" if self.queries == ALL_QUERIES else f"the last {self.queries} prompt tokens"
        return f"attention received from {who}"
