"""Decode attention that is watched: what a rule of eviction needs to know of a step, from the same pass over K and V."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, library

from kvcompress import _check
from kvcompress.decode import _per_store, _row_counts, _scale, check_dense, check_ragged

__all__ = ["observed_decode_attention_", "observed_ragged_decode_attention_"]

GroupReduce = Literal["mean", "max", "sum"]
_GROUP_REDUCE = {"mean": 1, "max": 2, "sum": 3}
_MAX_ROWS = 1024


def observed_decode_attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    sums: Tensor | None = None,
    weights: Tensor | None = None,
    history: Tensor | None = None,
    seen: Tensor | None = None,
    softmax_scale: float | None = None,
    decay: float = 1.0,
    power: int = 1,
    group_reduce: GroupReduce = "mean",
) -> tuple[Tensor, Tensor]:
    """`decode_attention` that also keeps, in place, how much its queries look at each entry.

    With ``x[g, i, j]`` the scaled logit of query i of query head g and entry j, ``P = exp(x - lse)`` its probability, 0 where
    query i does not see j, and n = num_queries:

    - ``sums[j] = decay ** n * sums[j] + weights[j] * sum over i of decay ** (n - 1 - i) * reduce over g of P[g, i, j] **
      power``: running column sums (H2O: decay 1), sums with a half-life, sums of squares (OBCache's value score: power 2,
      "sum", weights the squared norms of the values), or, with decay 0, the last query's probabilities alone (TOVA), whatever
      sums held before.
    - ``history[j, (seen - n + i) % width] = reduce over g of x[g, i, j]``, -inf where query i does not see j: the rows of
      the last `width` queries, entry by entry (MorphKV; see `history_scores`).

    g runs over the query heads of a kv head where sums or history have num_kv_heads heads, and over one head, so without
    reduction, where they have num_q_heads. Slots behind the entries are neither read nor written. float32 throughout, sums
    over heads in their order. Two launches, as without; bitwise the same from run to run.

    Args:
        q, k, v, lengths, softmax_scale: as in `decode_attention`; the new tokens are stored already. At most 1024 queries a kv
            head.
        sums: ``[batch, num_kv_heads or num_q_heads, capacity]`` float32, changed in place.
        weights: ``[batch, num_kv_heads, capacity]`` float32, factor of an entry in sums; None: 1.
        history: ``[batch, num_kv_heads or num_q_heads, capacity, width]`` float32, changed in place.
        seen: int32, tokens seen so far, these included: ``[batch]``, ``[batch, 1]`` or ``[batch, num_kv_heads]``; needed with
            history.
        decay: from 0 to 1.
        power: 1 or 2.
        group_reduce: over the query heads of a kv head: "mean", "max" or "sum".

    Returns:
        out, lse as in `decode_attention`.

    Raises:
        ValueError, TypeError: ``observed_decode_attention_: argument must be ..., got ...``.

    Scratch: that of `decode_attention`, and the logits: ``4 * batch * num_q_heads * num_queries * capacity`` bytes, the rows of
    a kv head rounded up to an even number and the capacity to a multiple of 16.

    Example:
        >>> q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
        >>> sums = torch.zeros(1, 2, 100)
        >>> out, lse = kvcompress.observed_decode_attention_(q, k, v, sums=sums)
        >>> sums.sum(-1)  # one query: a mass of one a head
        tensor([[1.0000, 1.0000]])
    """
    op = torch.ops.kvcompress.observed_decode_attention_.default
    reduce = _code("observed_decode_attention_", group_reduce)
    return _check.call(
        op, q, k, v, lengths, sums, weights, history, seen, _scale(q, softmax_scale), decay, power, reduce
    )


def observed_ragged_decode_attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    lengths: Tensor,
    *,
    max_length: int,
    sums: Tensor | None = None,
    weights: Tensor | None = None,
    history: Tensor | None = None,
    seen: Tensor | None = None,
    softmax_scale: float | None = None,
    decay: float = 1.0,
    power: int = 1,
    group_reduce: GroupReduce = "mean",
) -> tuple[Tensor, Tensor]:
    """`observed_decode_attention_` over a ragged store; sums, weights and history lie beside its rows.

    Args:
        q, k, v, row_start, lengths, max_length, softmax_scale: as in `ragged_decode_attention`.
        sums: ``[total]`` float32, changed in place.
        weights: ``[total]`` float32.
        history: ``[total, width]`` float32, changed in place.
        seen: ``[batch * num_kv_heads]`` int32, tokens seen so far, these included; needed with history.
        decay, power, group_reduce: as in `observed_decode_attention_`.

    Returns:
        out, lse as in `ragged_decode_attention`.

    Raises:
        ValueError, TypeError: ``observed_ragged_decode_attention_: argument must be ..., got ...``.

    Scratch: that of `ragged_decode_attention`, and the logits: ``4 * batch * num_q_heads * num_queries * max_length`` bytes,
    rounded up likewise.

    Example:
        >>> q, k, v = torch.randn(1, 4, 1, 64), torch.randn(40, 64), torch.randn(40, 64)
        >>> start, lengths, sums = torch.tensor([0, 30]), torch.tensor([28, 5], dtype=torch.int32), torch.zeros(40)
        >>> _ = kvcompress.observed_ragged_decode_attention_(q, k, v, start, lengths, max_length=28, sums=sums)
        >>> sums[:28].sum(), sums[28:30]
        (tensor(1.0000), tensor([0., 0.]))
    """
    op = torch.ops.kvcompress.observed_ragged_decode_attention_.default
    reduce = _code("observed_ragged_decode_attention_", group_reduce)
    scale = _scale(q, softmax_scale)
    watched = (sums, weights, history, seen)
    return _check.call(op, q, k, v, row_start, lengths, *watched, max_length, scale, decay, power, reduce)


def _code(op: str, group_reduce: str) -> int:
    code = _GROUP_REDUCE.get(group_reduce)
    if code is None:
        raise ValueError(f'{op}: group_reduce must be "mean", "max" or "sum", got "{group_reduce}"')
    return code


# --- fakes: shapes, and the checks of csrc/attend/decode_attention.cpp in the same words and order


def _watched(
    op: str,
    argument: str,
    t: Tensor | None,
    q: Tensor,
    k: Tensor,
    num_kv_heads: int,
    *,
    is_history: bool,
    may_be_by_head: bool,
    is_written: bool,
) -> None:
    if t is None:
        return
    is_ragged = k.dim() == 2
    rank = (1 if is_ragged else 3) + is_history
    layout = ("total" if is_ragged else "batch, heads, capacity") + (", width" if is_history else "")
    _check.rank(op, argument, t, rank, f"[{layout}]")
    _check.dtype(op, argument, t, torch.float32)
    _check.same_device(op, argument, t, q, "q")
    if is_ragged:
        must = f"of the rows of k ({k.shape[0]})"
        _check.require(t.shape[0] == k.shape[0], op, argument, must, _check.shape_string(t))
    else:
        heads_fit = t.shape[1] == num_kv_heads or (may_be_by_head and t.shape[1] == q.shape[1])
        ok = t.shape[0] == q.shape[0] and heads_fit and t.shape[2] == k.shape[2]
        heads = f"{num_kv_heads} or {q.shape[1]}" if may_be_by_head else f"{num_kv_heads}"
        must = f"of the batch ({q.shape[0]}), {heads} heads and the capacity ({k.shape[2]}) of k"
        _check.require(ok, op, argument, must, _check.shape_string(t))
    ok = not is_history or t.shape[-1] >= 1
    _check.require(ok, op, argument, "of a width of at least 1", _check.shape_string(t))
    _check.last_contiguous(op, argument, t)
    overlaps = is_written and any(t.shape[dim] > 1 and t.stride(dim) == 0 for dim in range(t.dim()))
    _check.require(not overlaps, op, argument, "free of overlaps", "a stride of 0")


def _observed(
    op: str,
    q: Tensor,
    k: Tensor,
    num_kv_heads: int,
    sums: Tensor | None,
    weights: Tensor | None,
    history: Tensor | None,
    seen: Tensor | None,
    decay: float,
    power: int,
    group_reduce: int,
) -> None:
    _check.require(sums is not None or history is not None, op, "sums", "there unless history is", "neither")
    _check.require(sums is not None or weights is None, op, "weights", "absent without sums", "weights")
    _check.require(seen is not None or history is None, op, "seen", "there with history", "none")
    same = (q, k, num_kv_heads)
    _watched(op, "sums", sums, *same, is_history=False, may_be_by_head=True, is_written=True)
    _watched(op, "weights", weights, *same, is_history=False, may_be_by_head=False, is_written=False)
    _watched(op, "history", history, *same, is_history=True, may_be_by_head=True, is_written=True)
    _check.require(0 <= decay <= 1, op, "decay", "from 0 to 1", f"{decay:f}")
    _check.require(power in (1, 2), op, "power", "1 or 2", power)
    _check.require(1 <= group_reduce <= 3, op, "group_reduce", "1 (mean), 2 (max) or 3 (sum)", group_reduce)
    rows = q.shape[1] // num_kv_heads * q.shape[2]
    must = "of at most 1024 queries a kv head, num_queries times q_per_kv"
    _check.require(rows <= _MAX_ROWS, op, "q", must, rows)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@library.register_fake("kvcompress::observed_decode_attention_")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    sums: Tensor | None,
    weights: Tensor | None,
    history: Tensor | None,
    seen: Tensor | None,
    softmax_scale: float,
    decay: float,
    power: int,
    group_reduce: int,
) -> tuple[Tensor, Tensor]:
    op = "observed_decode_attention_"
    check_dense(op, q, k, v, lengths, softmax_scale)
    _observed(op, q, k, k.shape[1], sums, weights, history, seen, decay, power, group_reduce)
    _row_counts(op, "seen", seen, k.shape[1], q)
    return _results(q)


@library.register_fake("kvcompress::observed_ragged_decode_attention_")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    lengths: Tensor,
    sums: Tensor | None,
    weights: Tensor | None,
    history: Tensor | None,
    seen: Tensor | None,
    max_length: int,
    softmax_scale: float,
    decay: float,
    power: int,
    group_reduce: int,
) -> tuple[Tensor, Tensor]:
    op = "observed_ragged_decode_attention_"
    heads = check_ragged(op, q, k, v, row_start, lengths, max_length, softmax_scale)
    _observed(op, q, k, heads, sums, weights, history, seen, decay, power, group_reduce)
    if seen is not None:
        _per_store(op, "seen", seen, torch.int32, lengths.shape[0], q)
    return _results(q)
