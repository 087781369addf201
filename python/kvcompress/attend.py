"""Attend: attention of new queries over what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvcompress.decode import decode_attention

__all__ = ["attend", "attend_with_lse"]

_LONG_PROMPT = (
    8192  # tokens from which a cuDNN plan (20 - 60 ms, once a length) pays: measured 0.3 s saved at 32k on an H200
)
_ANY_BACKEND = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_TURN = 64  # queries that attend under a mask of their own where rows differ in length
_MASK_ELEMENTS = 1 << 26  # a mask of many queries over many entries is made in blocks of at most 64 MiB


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    starts: Sequence[int] | None = None,
    ends: Sequence[int] | None = None,
    device_ends: Tensor | None = None,
) -> Tensor:
    """Softmax attention in which every row of the batch has its own bounds, known on the host.

    Row b's entries are the slots ``[starts[b], ends[b])``; its queries are the last ones of that row, so query i sees the
    slots ``[starts[b], ends[b] - (num_queries - 1 - i))``. A query that sees nothing (padding) gets zeros.

    Up to 8 queries over entries that start at slot 0, so every decode step, go through `kvcompress.decode_attention`, all
    else through torch's scaled_dot_product_attention (as do tensors that need gradients, and head dims that the op refuses).
    K and V are never copied or repeated for grouped queries, and a mask is made only where neither the shapes nor the bounds
    say the same: one query or a few over rows of unequal length (``[batch, 1, num_queries, seq_len]``), or several
    queries behind older entries (``[num_queries, seq_len]``, in blocks).

    Args:
        q: ``[batch, num_q_heads, num_queries, head_dim]``.
        k, v: ``[batch, heads, seq_len, head_dim]``; heads divides num_q_heads (kv heads, or the query heads themselves).
        softmax_scale: factor of the logits; None: ``1 / sqrt(head_dim)``.
        starts: first slot of each row; None: 0.
        ends: slot behind the last of each row; None: seq_len.
        device_ends: `ends` as ``[batch]`` int32 on the device, where the caller has it already.

    Returns:
        ``[batch, num_q_heads, num_queries, head_dim of v]``, dtype of q.

    Example:
        >>> q, k, v = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 100, 64), torch.randn(2, 2, 100, 64)
        >>> attend(q, k, v, ends=[100, 60]).shape
        torch.Size([2, 8, 1, 64])
    """
    return _attend(q, k, v, softmax_scale, starts, ends, device_ends, wants_lse=False)[0]


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, starts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor | None]:
    """`attend`, and the natural log-sum-exp of the scaled logits of every query, which the kernels behind it have anyway.

    The kernel is the one that `attend` takes, so the output is the same to the bit; the log-sum-exp is what that kernel
    gives away. None where it gives none, or none as exact as a pass over K would: queries behind older entries, tensors that
    need gradients, torch's math backend, half precision on a CPU (torch's kernel there is off by 1e-4) and float32 on a
    GPU (by 3e-6, a dozen roundings).

    Args:
        q, k, v, softmax_scale, starts: as in `attend`.

    Returns:
        The output, and ``[batch, num_q_heads, num_queries]`` float32, contiguous, +inf for a query that sees nothing; or None.

    Example:
        >>> q, k, v = torch.randn(1, 8, 100, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
        >>> out, lse = attend_with_lse(q, k, v)
        >>> bool((out == attend(q, k, v)).all()), lse.shape
        (True, torch.Size([1, 8, 100]))
    """
    out, lse = _attend(q, k, v, softmax_scale, starts, None, None, wants_lse=True)
    return out, None if lse is None else lse.contiguous()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    starts: Sequence[int] | None,
    ends: Sequence[int] | None,
    device_ends: Tensor | None,
    *,
    wants_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, num_queries, seq_len = q.shape[0], q.shape[2], k.shape[2]
    starts = [0] * batch if starts is None else list(starts)
    ends = [seq_len] * batch if ends is None else list(ends)
    if not any(starts) and _is_decode(q, k, v):
        last = max(ends, default=seq_len)
        if min(ends, default=last) == last:
            device_ends = None
        elif device_ends is None:
            device_ends = torch.tensor(ends, dtype=torch.int32, device=q.device)
        out, lse, _ = decode_attention(
            q, k[:, :, :last], v[:, :, :last], lengths=device_ends, softmax_scale=softmax_scale
        )
        return out, lse
    if len(set(zip(starts, ends))) <= 1:
        first, last = (starts[0], ends[0]) if batch else (0, seq_len)
        return _equal_rows(q, k[:, :, first:last], v[:, :, first:last], softmax_scale, wants_lse)
    if num_queries == 1 and all(start < end for start, end in zip(starts, ends)):
        last = max(ends)
        slots = torch.arange(last, dtype=torch.int32, device=q.device)
        if device_ends is None:
            device_ends = torch.tensor(ends, dtype=torch.int32, device=q.device)
        visible = slots < device_ends[:, None]
        if any(starts):
            visible &= slots >= torch.tensor(starts, dtype=torch.int32, device=q.device)[:, None]
        return _one_query(q, k[:, :, :last], v[:, :, :last], softmax_scale, visible[:, None, None]), None
    if num_queries <= _TURN and num_queries < min(ends) and not any(starts) and not wants_lse:
        return _turn(q, k[:, :, : max(ends)], v[:, :, : max(ends)], softmax_scale, ends, device_ends), None
    out, parts = q.new_zeros((*q.shape[:3], v.shape[3])), []
    for row, (first, last) in enumerate(zip(starts, ends)):
        one = slice(row, row + 1)
        out[one], seen = _equal_rows(q[one], k[one, :, first:last], v[one, :, first:last], softmax_scale, wants_lse)
        parts.append(seen)
    return out, _joined(parts)


def _turn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, ends: Sequence[int], device_ends: Tensor | None
) -> Tensor:
    """A few queries behind rows of other lengths, each longer than these: one call, under a mask for each row."""
    if device_ends is None:
        device_ends = torch.tensor(ends, dtype=torch.int32, device=q.device)
    behind = torch.arange(q.shape[2] - 1, -1, -1, dtype=torch.int32, device=q.device)  # later tokens of the same turn
    slots = torch.arange(k.shape[2], dtype=torch.int32, device=q.device)
    visible = slots < (device_ends[:, None] - behind)[:, :, None]
    return _grouped(q, k, v, visible[:, None], scale)


def _is_decode(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """A few queries, of what `decode_attention` takes: its own split over the entries, bounds on the device, no mask."""
    head_dim = q.shape[3]
    fits = q.shape[2] <= 8 and head_dim == v.shape[3] <= 256 and head_dim % 8 == 0 and head_dim > 0
    return fits and q.dtype in (torch.float32, torch.float16, torch.bfloat16) and not _differentiates(q, k, v)


def _differentiates(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _equal_rows(q: Tensor, k: Tensor, v: Tensor, scale: float | None, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """All rows see the same slots: the queries are the last tokens of k and v."""
    num_queries, seq_len = q.shape[2], k.shape[2]
    blind = num_queries - seq_len
    if blind > 0:
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        lse: Tensor | None = q.new_full(q.shape[:3], torch.inf, dtype=torch.float32) if wants_lse else None
        if seq_len > 0:
            out[:, :, blind:], seen = _equal_rows(q[:, :, blind:], k, v, scale, wants_lse)
            if lse is not None and seen is not None:
                lse[:, :, blind:] = seen
            else:
                lse = None
        return out, lse
    if num_queries == seq_len and (wants_lse or num_queries > 1):
        return _causal(q, k, v, scale, wants_lse)
    if num_queries == 1:
        return _one_query(q, k, v, scale, None), None
    block = max(1, _MASK_ELEMENTS // seq_len)
    parts = [
        _behind(q[:, :, i : i + block], k, v, scale, hidden=max(0, num_queries - i - block))
        for i in range(0, num_queries, block)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2), None


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The log-sum-exp of all rows, if every one of them has it."""
    known = [lse for lse in parts if lse is not None]
    return torch.cat(known) if known and len(known) == len(parts) else None


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float | None, visible: Tensor | None) -> Tensor:
    """One query a row. The query heads of a kv head become its query rows: no repeat of K and V, and the fast path stays."""
    batch, num_q_heads, _, head_dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, head_dim)
    if visible is not None:
        visible = visible.expand(-1, -1, rows.shape[2], -1)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible, scale=scale)
    return out.reshape(batch, num_q_heads, 1, v.shape[3])


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """A whole prompt, without any mask."""
    gqa = q.shape[1] != k.shape[1]
    if gqa and q.dtype == torch.float32 and q.is_cuda:
        return _grouped(q, k, v, None, scale), None  # no fused CUDA kernel takes float32 with enable_gqa
    # While attached, cuDNN is off for its plan a length; all layers of a long prompt share one, and it is the fastest.
    is_long = q.is_cuda and q.shape[2] >= _LONG_PROMPT
    with sdpa_kernel(_ANY_BACKEND) if is_long else nullcontext():
        known = _with_lse(q, k, v, scale, gqa) if wants_lse else None
        if known is not None:
            return known
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa), None


def _with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float | None, gqa: bool) -> tuple[Tensor, Tensor] | None:
    """The kernel that `scaled_dot_product_attention` takes for a whole prompt, asked for its log-sum-exp as well.

    The kernels are torch's own and lie behind its dispatcher, with the layouts of their log-sum-exp: ``[batch, heads,
    num_queries]`` of flash, the last dimension rounded up to 32 of the memory-efficient one, one more of 1 of cuDNN.
    """
    is_exact = q.is_cuda != (q.dtype == torch.float32)
    if _differentiates(q, k, v) or not is_exact or q.numel() == 0 or q.shape[3] % 8 or v.shape[3] % 8:
        return None
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=scale, enable_gqa=gqa)
    out: Tensor
    lse: Tensor
    if choice == SDPBackend.FLASH_ATTENTION.value and q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[:2]
    elif choice == SDPBackend.FLASH_ATTENTION.value:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    elif choice == SDPBackend.CUDNN_ATTENTION.value:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=scale)[:2]
    elif choice == SDPBackend.EFFICIENT_ATTENTION.value:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)[
            :2
        ]
    else:
        return None
    return out, lse.reshape(*q.shape[:2], -1)[:, :, : q.shape[2]]


def _behind(q: Tensor, k: Tensor, v: Tensor, scale: float | None, *, hidden: int) -> Tensor:
    """Several queries, older entries before them; the last `hidden` slots belong to later queries."""
    seq_len, num_queries = k.shape[2] - hidden, q.shape[2]
    mask = torch.ones(num_queries, seq_len, dtype=torch.bool, device=q.device).tril_(seq_len - num_queries)
    return _grouped(q, k[:, :, :seq_len], v[:, :, :seq_len], mask, scale)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Grouped queries without repeating K and V: kv heads join the batch, and each is read by its whole group (stride 0).

    `mask` is ``[num_queries, seq_len]`` or ``[batch, 1, num_queries, seq_len]``, True where visible.
    """
    batch, num_q_heads, num_queries, head_dim = q.shape
    heads = k.shape[1]
    group = num_q_heads // heads
    if group > 1 and batch > 1 and any(t.stride(0) != heads * t.stride(1) for t in (k, v)):
        masks = [mask] * batch if mask is None or mask.dim() == 2 else mask.split(1)
        rows = [_grouped(q[b : b + 1], k[b : b + 1], v[b : b + 1], own, scale) for b, own in enumerate(masks)]
        return torch.cat(rows)
    if group > 1:
        if mask is not None and mask.dim() == 4:
            mask = mask.repeat_interleave(heads, 0)
        q = q.reshape(batch * heads, group, num_queries, head_dim)
        k, v = (t.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.reshape(batch, num_q_heads, num_queries, v.shape[3])
