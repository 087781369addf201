"""Decode attention: a few new tokens attend over what is stored."""

from __future__ import annotations

import torch
from torch import Tensor, library

from kvcompress import _check

__all__ = ["decode_attention", "ragged_decode_attention"]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the newest tokens over a dense store, split over the whole machine: "flash decoding".

    ``x[i, j] = softmax_scale * <q[b, h, i], k[b, h // q_per_kv, j]>``, ``out[b, h, i] = softmax over visible j of x[i, j],
    times v[b, h // q_per_kv, j]``. The new tokens' own keys and values are already stored, as the last entries of each
    row: query i sees the slots ``[0, lengths[b] - (num_queries - 1 - i))``. What lies behind the entries is never read.

    K and V are read once for all query heads of a kv head and all new tokens, as long as these are at most 64 rows
    together (head_dim above 128: 32; float32: 32, 16 above head_dim 64, 8 above 128); more are taken in turns. Up to 16
    rows of 16-bit elements take the shortest way, from memory to the tensor cores' registers. Softmax and sums are
    float32. Two launches, whose number and work are the same for every length that fits the capacity; lengths are read on
    the device, so a captured CUDA graph serves a growing cache. Bitwise the same from run to run.

    Args:
        q: ``[batch, num_q_heads, num_queries, head_dim]`` float32, float16 or bfloat16, after RoPE, num_queries from 1 to
            8; any strides with a contiguous last dimension. head_dim is a multiple of 8 up to 256.
        k: ``[batch, num_kv_heads, capacity, head_dim]``, same dtype; num_kv_heads divides num_q_heads.
        v: same shape as k.
        lengths: int32, entries of each row, at most the capacity: ``[batch]``, ``[batch, 1]`` or, where kv heads differ, ``[batch,
            num_kv_heads]``; None: all slots are entries.
        softmax_scale: None: ``head_dim ** -0.5``.
        return_logits: also give the scaled logits.

    Returns:
        out ``[batch, num_q_heads, num_queries, head_dim]`` in q's dtype, 0 where nothing is visible; lse ``[batch,
        num_q_heads, num_queries]`` float32, the natural log of the sum of exp of the scaled logits, -inf where nothing is
        visible; logits ``[batch, num_q_heads, num_queries, capacity]`` float32, -inf where not visible, or ``[0]``.
        ``(logits - lse[..., None]).exp()`` are the probabilities.

    Raises:
        ValueError, TypeError: ``decode_attention: argument must be ..., got ...``.

    Scratch: at most ``4 * (512 + batch * num_kv_heads) * q_per_kv * num_queries * (head_dim + 2)`` bytes.

    Example:
        >>> q = torch.randn(1, 32, 1, 64)
        >>> k, v = torch.randn(2, 1, 8, 1000, 64)  # room for 1000, 600 stored
        >>> out, lse, _ = kvcompress.decode_attention(q, k, v, lengths=torch.tensor([600], dtype=torch.int32))
        >>> out.shape, lse.shape
        (torch.Size([1, 32, 1, 64]), torch.Size([1, 32, 1]))
    """
    op = torch.ops.kvcompress.decode_attention.default
    return _check.call(op, q, k, v, lengths, _scale(q, softmax_scale), return_logits)


def ragged_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    lengths: Tensor,
    *,
    max_length: int,
    softmax_scale: float | None = None,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode_attention` over a ragged store: every (batch, kv head) has its own number of entries.

    The entries of ``(b, h)`` are the rows ``[row_start[s], row_start[s] + lengths[s])`` of k and v, ``s = b * num_kv_heads +
    h``; rows behind them may be room for new tokens or belong to another head. The work is cut into equal parts
    whatever the lengths, so a head of ten times the entries of another gets ten times the workers.

    Args:
        q: ``[batch, num_q_heads, num_queries, head_dim]`` as in `decode_attention`.
        k: ``[total, head_dim]``, same dtype, all heads packed; any stride between the rows.
        v: same shape as k.
        row_start: ``[batch * num_kv_heads]`` int64, first row of each head.
        lengths: ``[batch * num_kv_heads]`` int32, entries of each head, at most max_length; heads may be empty.
        max_length: what no length exceeds, known on the host: the width of the logits.
        softmax_scale: None: ``head_dim ** -0.5``.
        return_logits: also give the scaled logits.

    Returns:
        out, lse, logits as in `decode_attention`; logits are ``[batch, num_q_heads, num_queries, max_length]``.

    Raises:
        ValueError, TypeError: ``ragged_decode_attention: argument must be ..., got ...``.

    Scratch: as `decode_attention`.

    Example:
        >>> q, k, v = torch.randn(1, 4, 1, 64), torch.randn(40, 64), torch.randn(40, 64)
        >>> start, lengths = torch.tensor([0, 30]), torch.tensor([28, 5], dtype=torch.int32)
        >>> out, lse, logits = kvcompress.ragged_decode_attention(q, k, v, start, lengths, max_length=28, return_logits=True)
        >>> logits.shape
        torch.Size([1, 4, 1, 28])
    """
    op = torch.ops.kvcompress.ragged_decode_attention.default
    return _check.call(op, q, k, v, row_start, lengths, max_length, _scale(q, softmax_scale), return_logits)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    if softmax_scale is not None:
        return softmax_scale
    return max(q.shape[-1], 1) ** -0.5 if q.dim() > 0 else 1.0


def _tensors(op: str, q: Tensor, k: Tensor, v: Tensor, rank: int, layout: str) -> None:
    _check.rank(op, "q", q, 4, "[batch, num_q_heads, num_queries, head_dim]")
    _check.rank(op, "k", k, rank, layout)
    _check.rank(op, "v", v, rank, layout)
    _check.float_dtype(op, "q", q)
    _check.same_dtype(op, "k", k, q, "q")
    _check.same_dtype(op, "v", v, q, "q")
    _check.same_device(op, "k", k, q, "q")
    _check.same_device(op, "v", v, q, "q")
    _check.require(v.shape == k.shape, op, "v", f"of the shape of k {_check.shape_string(k)}", _check.shape_string(v))
    num_queries, head_dim = q.shape[2:]
    _check.require(k.shape[-1] == head_dim, op, "k", f"of the head_dim of q ({head_dim})", k.shape[-1])
    ok = 8 <= head_dim <= 256 and head_dim % 8 == 0
    _check.require(ok, op, "head_dim", "a multiple of 8 from 8 to 256", head_dim)
    _check.require(1 <= num_queries <= 8, op, "num_queries", "from 1 to 8", num_queries)


def _heads(op: str, num_q_heads: int, num_kv_heads: int) -> None:
    _check.require(num_kv_heads >= 1, op, "num_kv_heads", "at least 1", num_kv_heads)
    ok = num_q_heads >= 1 and num_q_heads % num_kv_heads == 0
    _check.require(ok, op, "num_q_heads", f"a multiple of num_kv_heads ({num_kv_heads})", num_q_heads)


def _strides(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    _check.last_contiguous(op, "q", q)
    _check.last_contiguous(op, "k", k)
    _check.last_contiguous(op, "v", v)


def _finite_scale(op: str, softmax_scale: float) -> None:
    ok = 0 < softmax_scale < float("inf")
    _check.require(ok, op, "softmax_scale", "finite and above 0", f"{softmax_scale:f}")


def _per_store(op: str, argument: str, t: Tensor, dtype: torch.dtype, stores: int, q: Tensor) -> None:
    ok = t.dim() == 1 and t.shape[0] == stores
    _check.require(ok, op, argument, f"[batch * num_kv_heads] ({stores})", f"{t.dim()}D {_check.shape_string(t)}")
    _check.dtype(op, argument, t, dtype)
    _check.same_device(op, argument, t, q, "q")
    _check.last_contiguous(op, argument, t)


def _row_counts(op: str, argument: str, t: Tensor | None, num_kv_heads: int, q: Tensor) -> None:
    """One number a row of the batch or a (row, kv head)."""
    if t is None:
        return
    batch, dims = q.shape[0], t.dim()
    ok = 1 <= dims <= 2 and t.shape[0] == batch and (dims == 1 or t.shape[1] in (1, num_kv_heads))
    must = f"[batch] ({batch}), [batch, 1] or [batch, num_kv_heads] ({num_kv_heads})"
    _check.require(ok, op, argument, must, f"{dims}D {_check.shape_string(t)}")
    _check.dtype(op, argument, t, torch.int32)
    _check.same_device(op, argument, t, q, "q")


def _outputs(q: Tensor, width: int, return_logits: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[:3]
    logits = q.new_empty((*rows, width) if return_logits else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32), logits


def check_dense(op: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, softmax_scale: float) -> None:
    """All that an op over a dense store asks of these arguments."""
    _tensors(op, q, k, v, 4, "[batch, num_kv_heads, capacity, head_dim]")
    _check.require(k.shape[0] == q.shape[0], op, "k", f"of the batch of q ({q.shape[0]})", k.shape[0])
    _heads(op, q.shape[1], k.shape[1])
    _strides(op, q, k, v)
    _row_counts(op, "lengths", lengths, k.shape[1], q)
    _finite_scale(op, softmax_scale)


def check_ragged(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    lengths: Tensor,
    max_length: int,
    softmax_scale: float,
) -> int:
    """All that an op over a ragged store asks of these arguments; num_kv_heads."""
    _tensors(op, q, k, v, 2, "[total, head_dim]")
    batch = q.shape[0]
    stores = lengths.shape[0] if lengths.dim() == 1 else -1
    ok = stores >= 0 and (stores == 0 if batch == 0 else stores % batch == 0)
    must = f"[batch * num_kv_heads], a multiple of the batch of q ({batch})"
    _check.require(ok, op, "lengths", must, f"{lengths.dim()}D {_check.shape_string(lengths)}")
    num_kv_heads = 1 if batch == 0 else stores // batch
    _heads(op, q.shape[1], num_kv_heads)
    _strides(op, q, k, v)
    _per_store(op, "lengths", lengths, torch.int32, stores, q)
    _per_store(op, "row_start", row_start, torch.int64, stores, q)
    must = f"from 0 to the rows of k ({k.shape[0]})"
    _check.require(0 <= max_length <= k.shape[0], op, "max_length", must, max_length)
    _finite_scale(op, softmax_scale)
    return num_kv_heads


@library.register_fake("kvcompress::decode_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, softmax_scale: float, return_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_dense("decode_attention", q, k, v, lengths, softmax_scale)
    return _outputs(q, k.shape[2], return_logits)


@library.register_fake("kvcompress::ragged_decode_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    lengths: Tensor,
    max_length: int,
    softmax_scale: float,
    return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_ragged("ragged_decode_attention", q, k, v, row_start, lengths, max_length, softmax_scale)
    return _outputs(q, max_length, return_logits)
