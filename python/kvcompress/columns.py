"""Column sums: statistics of the columns of an attention map, over any number of queries."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, library

from kvcompress import _check

__all__ = ["column_sums"]

GroupReduce = Literal["none", "mean", "max", "sum"]
Statistic = Literal["sum", "sum_squares", "max", "mean", "key_change", "joint_change", "cross_change"]

GROUP_REDUCE = {"none": 0, "mean": 1, "max": 2, "sum": 3}
_STATISTIC = {"sum": 0, "sum_squares": 1, "max": 2, "mean": 3, "key_change": 4, "joint_change": 5, "cross_change": 6}
_OUTPUT_AWARE = 4  # codes from here on need values and outputs


def column_sums(
    q: Tensor,
    k: Tensor,
    *,
    statistic: Statistic = "sum",
    group_reduce: GroupReduce = "mean",
    lse: Tensor | None = None,
    query_weights: Tensor | None = None,
    query_positions: Tensor | None = None,
    seq_start: Tensor | None = None,
    v: Tensor | None = None,
    output: Tensor | None = None,
    first_query: int | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """A statistic of every column of a causal attention map, over all queries or any set of them.

    ``A[b, h, i, j] = query_weights[b, h, i] * softmax over visible j of softmax_scale * <q[b, h, i], k[b, h // q_per_kv,
    j]>``, 0 where row i does not see key j; then over the rows i of each query head

    - "sum": ``sum A``, the attention that a key receives (H2O, PrefixKV, KVMerger, LoCoCo);
    - "mean": the sum divided by how many rows see the key, at least 1 (ZipCache);
    - "sum_squares": ``sum A^2`` (OBCache's value term, but for the norm of the value);
    - "max": ``max A``;
    - with s the scaled logits and o = `output`, first-order changes of the output when key j is zeroed, "key_change":
      ``sum A^2 s^2 |v_j - o_i|^2``; key and value, "joint_change": ``sum A^2 |v_j + s (v_j - o_i)|^2``; and what the joint
      change has beyond both alone, "cross_change": ``sum 2 A^2 s <v_j, v_j - o_i>`` (OBCache);

    and over the query heads of a kv head. Float32 throughout; the map is never stored, and tiles that no row of them sees are
    neither loaded nor computed. A sibling of `window_scores`, which is for few queries at the end of the prompt, with pools
    and fills: the rows and their statistics are the same code, the work is cut the other way round, a query head and a block
    of keys at a time, so that the causal triangle is spread evenly.

    Row i sits at ``query_positions[b, i]``, or at ``first_query + i``, and sees the keys ``[seq_start[b], min(position, seq_len
    - 1)]``. Rows before ``seq_start[b]`` are padding and do not count. A NaN logit makes its row NaN (with ``lse`` given: that
    column alone).

    Args:
        q: ``[batch, num_q_heads, window, head_dim]`` float32, float16 or bfloat16, after RoPE; any strides with a contiguous last
            dimension. head_dim is a multiple of 8 up to 256. `window` is any number of rows, the whole prompt as a rule.
        k: ``[batch, num_kv_heads, seq_len, head_dim]``, same dtype; num_kv_heads divides num_q_heads.
        statistic: of the rows, see above.
        group_reduce: over the query heads of a kv head: "mean", "max", "sum", or "none": keep num_q_heads rows.
        lse: ``[batch, num_q_heads, window]`` float32, the natural log of the sum of exp of the scaled logits over the visible
            keys, as flash attention returns it; half of the work falls away.
        query_weights: ``[batch, num_q_heads, window]`` float32, a factor of each row of the map.
        query_positions: ``[batch, window]`` int32, ascending, repeats allowed: a row that stands twice counts twice. -1: no row.
        seq_start: ``[batch]`` int32, first real entry of each row (left padding); None: no padding.
        v: values like k, with `output`, for the changes of the output and only for them.
        output: ``[batch, num_q_heads, window, head_dim]`` attention output of the rows, before the output projection.
        first_query: position of the first row without `query_positions`; None: ``seq_len - window``.
        softmax_scale: None: ``head_dim ** -0.5``.

    Returns:
        ``[batch, num_kv_heads, seq_len]`` float32 (num_q_heads rows if nothing reduces the group), -inf before
        ``seq_start[b]``, 0 where no row sees the key.

    Raises:
        ValueError, TypeError: ``column_sums: argument must be ..., got ...``.

    Scratch: ``4 * batch * num_q_heads * seq_len`` bytes unless group_reduce is "none", and at most ``max(8 * batch *
    num_q_heads * window, 2 MiB)`` for row statistics, half as much again for a change of the output.

    Example:
        >>> q, k = torch.randn(1, 32, 100, 64), torch.randn(1, 8, 100, 64)
        >>> received = kvcompress.column_sums(q, k)
        >>> received.shape, round(float(received.sum()))
        (torch.Size([1, 8, 100]), 800)
    """
    op = "column_sums"
    if first_query is None:
        first_query = 0
        if query_positions is None and q.dim() > 1 and k.dim() > 1:
            first_query = k.shape[-2] - q.shape[-2]
    if softmax_scale is None:
        softmax_scale = max(q.shape[-1], 1) ** -0.5 if q.dim() > 0 else 1.0
    return _check.call(
        torch.ops.kvcompress.column_sums.default,
        q,
        k,
        lse,
        query_weights,
        query_positions,
        seq_start,
        v,
        output,
        first_query,
        _check.code(op, "statistic", _STATISTIC, statistic),
        _check.code(op, "group_reduce", GROUP_REDUCE, group_reduce),
        softmax_scale,
    )


@library.register_fake("kvcompress::column_sums")
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    query_weights: Tensor | None,
    query_positions: Tensor | None,
    seq_start: Tensor | None,
    v: Tensor | None,
    output: Tensor | None,
    first_query: int,
    statistic: int,
    group_reduce: int,
    softmax_scale: float,
) -> Tensor:
    op = "column_sums"
    _check.attention_rows(op, q, k, lse, seq_start, first_query, softmax_scale)
    batch, num_q_heads, window = q.shape[:3]
    num_kv_heads, seq_len = k.shape[1:3]
    layout = "[batch, num_q_heads, window]"
    _check.companion(op, "query_weights", query_weights, layout, (batch, num_q_heads, window), q)
    _check.require(0 <= statistic < len(_STATISTIC), op, "statistic", "a code from 0 to 6", statistic)
    _check.require(0 <= group_reduce < 4, op, "group_reduce", "0 (none), 1 (mean), 2 (max) or 3 (sum)", group_reduce)
    for name, t, like, like_name in (("v", v, k, "k"), ("output", output, q, "q")):
        wanted = statistic >= _OUTPUT_AWARE
        must = "given for a change of the output" if wanted else "absent without a change of the output"
        _check.require((t is not None) == wanted, op, name, must, "None" if wanted else "a tensor")
        if t is not None:
            shape = _check.shape_string(like)
            ok = t.dim() == 4 and all(a == b for a, b in zip(t.shape, like.shape))
            _check.require(ok, op, name, f"of the shape of {like_name} {shape}", _check.shape_string(t))
            _check.same_dtype(op, name, t, like, like_name)
            _check.same_device(op, name, t, like, like_name)
            _check.last_contiguous(op, name, t)
    if query_positions is not None:
        ok = query_positions.dim() == 2 and query_positions.shape[0] == batch and query_positions.shape[1] == window
        got = f"{query_positions.dim()}D {_check.shape_string(query_positions)}"
        _check.require(ok, op, "query_positions", f"[batch, window] [{batch}, {window}]", got)
        _check.dtype(op, "query_positions", query_positions, torch.int32)
        _check.same_device(op, "query_positions", query_positions, q, "q")
        _check.last_contiguous(op, "query_positions", query_positions)
    heads = num_q_heads if group_reduce == 0 else num_kv_heads
    return q.new_empty((batch, heads, seq_len), dtype=torch.float32)
