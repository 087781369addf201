"""By how much a decode step's output would have changed without an entry: OBCache's scores, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, library

from kvcompress import _check

__all__ = ["output_terms_"]

Term = Literal["value", "key", "cross"]
_TERMS = {"value": 1, "key": 2, "cross": 4}
_MAX_ROWS, _MAX_HEAD_DIM = 64, 256


def output_terms_(
    sums: Tensor,
    out: Tensor,
    v: Tensor,
    logits: Tensor,
    lse: Tensor,
    *,
    lengths: Tensor | None = None,
    terms: Sequence[Term] = ("value", "key", "cross"),
    decay: float = 1.0,
) -> None:
    """Adds up, in place, how much each entry mattered to the output of `decode_attention`.

    For query i of head g, with ``A = exp(x - lse)`` its probability of entry j, ``s = x`` the scaled logit, O its output and v
    the entry's value, the squared change of O in second order when the value, the key or both become 0:

    - value: ``A^2 |v|^2``
    - key: ``(A s)^2 (|v|^2 + |O|^2 - 2 O.v)``
    - cross: ``2 A^2 s (|v|^2 - O.v)``; the joint score is all three

    ``sums[j] = decay ** n * sums[j] + sum over i of decay ** (n - 1 - i) * sum over the query heads of a kv head of the terms``,
    n the number of queries; decay 0 leaves the last query's terms alone. A query that does not see j adds nothing. float32
    throughout, sums over heads in their order: bitwise the same from run to run.

    Args:
        sums: ``[batch, num_kv_heads, capacity]`` float32, changed in place where there are entries.
        out: ``[batch, num_q_heads, num_queries, head_dim]`` float32, float16 or bfloat16, as `decode_attention` returned it. At
            most 64 queries a kv head; head_dim up to 256.
        v: ``[batch, num_kv_heads, capacity, head_dim]``, same dtype; any strides with a contiguous last dimension.
        logits: ``[batch, num_q_heads, num_queries, capacity]`` float32, as `decode_attention` returned them.
        lse: ``[batch, num_q_heads, num_queries]`` float32, likewise.
        lengths: ``[batch]`` int32, entries of each row; None: all slots are entries.
        terms: which ones; "value" alone needs no second look at V where its squared norm is kept: see the `weights` of
            `observed_decode_attention_`.
        decay: from 0 to 1.

    Raises:
        ValueError, TypeError: ``output_terms_: argument must be ..., got ...``.

    Scratch: none.

    Source: OBCache, arXiv 2510.07651, closed forms of its value, key and joint scores. The official code keeps a score a
    query head; here the heads that share an entry add up, as their output changes do.

    Example:
        >>> q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
        >>> out, lse, logits = kvcompress.decode_attention(q, k, v, return_logits=True)
        >>> sums = torch.zeros(1, 2, 100)
        >>> kvcompress.output_terms_(sums, out, v, logits, lse)
        >>> bool((sums >= 0).all())  # the joint score is a sum of squares
        True
    """
    unknown = [term for term in terms if term not in _TERMS]
    if unknown or not terms:
        raise ValueError(f'output_terms_: terms must be some of "value", "key" and "cross", got {tuple(terms)}')
    code = sum({_TERMS[term] for term in terms})
    _check.call(torch.ops.kvcompress.output_terms_.default, sums, out, v, logits, lse, lengths, decay, code)


@library.register_fake("kvcompress::output_terms_")
def _(
    sums: Tensor,
    out: Tensor,
    v: Tensor,
    logits: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    decay: float,
    terms: int,
) -> None:
    op = "output_terms_"
    _check.rank(op, "out", out, 4, "[batch, num_q_heads, num_queries, head_dim]")
    _check.rank(op, "v", v, 4, "[batch, num_kv_heads, capacity, head_dim]")
    _check.rank(op, "sums", sums, 3, "[batch, num_kv_heads, capacity]")
    _check.rank(op, "logits", logits, 4, "[batch, num_q_heads, num_queries, capacity]")
    _check.rank(op, "lse", lse, 3, "[batch, num_q_heads, num_queries]")
    _check.float_dtype(op, "out", out)
    _check.same_dtype(op, "v", v, out, "out")
    floats = {"sums": sums, "logits": logits, "lse": lse}
    for name, t in floats.items():
        _check.dtype(op, name, t, torch.float32)
    for name, t in ({"v": v} | floats).items():
        _check.same_device(op, name, t, out, "out")
    batch, num_q_heads, num_queries, head_dim = out.shape
    num_kv_heads, capacity = v.shape[1:3]
    must = f"of the batch ({batch}) and head_dim ({head_dim}) of out"
    _check.require(v.shape[0] == batch and v.shape[3] == head_dim, op, "v", must, _check.shape_string(v))
    _check.require(num_kv_heads >= 1, op, "num_kv_heads", "at least 1", num_kv_heads)
    ok = num_q_heads >= 1 and num_q_heads % num_kv_heads == 0
    _check.require(ok, op, "num_q_heads", f"a multiple of num_kv_heads ({num_kv_heads})", num_q_heads)
    must = f"of the batch, heads and capacity of v {_check.shape_string(v)}"
    _check.require(sums.shape == v.shape[:3], op, "sums", must, _check.shape_string(sums))
    rows = f"of the batch, heads and queries of out {_check.shape_string(out)}"
    must = f"{rows} and the capacity of v ({capacity})"
    _check.require(logits.shape == (*out.shape[:3], capacity), op, "logits", must, _check.shape_string(logits))
    _check.require(lse.shape == out.shape[:3], op, "lse", rows, _check.shape_string(lse))
    for name, t in {"out": out, "logits": logits, "lse": lse}.items():
        _check.require(t.is_contiguous(), op, name, "contiguous", "strides of its own")
    _check.last_contiguous(op, "v", v)
    _check.last_contiguous(op, "sums", sums)
    overlaps = any(sums.shape[dim] > 1 and sums.stride(dim) == 0 for dim in (0, 1))
    _check.require(not overlaps, op, "sums", "free of overlaps", "a stride of 0")
    _check.row_vector(op, "lengths", lengths, batch, out, "out")
    _check.require(1 <= head_dim <= _MAX_HEAD_DIM, op, "head_dim", "from 1 to 256", head_dim)
    most = num_q_heads // num_kv_heads * num_queries
    must = "of at most 64 queries a kv head, num_queries times q_per_kv"
    _check.require(most <= _MAX_ROWS, op, "out", must, most)
    _check.require(0 <= decay <= 1, op, "decay", "from 0 to 1", f"{decay:f}")
    _check.require(1 <= terms <= 7, op, "terms", "a sum of 1 (value), 2 (key) and 4 (cross)", terms)
