"""Decode attention in plain torch, float64 unless asked otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


def _one(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """One kv head: q [heads, n, D], k, v [width, D] of which `length` rows are entries."""
    n, width = q.shape[1], k.shape[0]
    seen = length - (n - 1 - torch.arange(n, device=q.device))
    visible = torch.arange(width, device=q.device) < seen[:, None]
    k, v = (torch.where(visible.any(0)[:, None], t, 0) for t in (k, v))  # what nobody sees may be NaN
    logits = (q @ k.mT * scale).masked_fill(~visible, -INF)
    lse = logits.logsumexp(-1) if width else q.new_full(q.shape[:2], -INF)
    p = (logits - lse[..., None]).exp().masked_fill(~visible, 0)
    return p @ v, lse, logits


def _stack(parts: list[tuple[Tensor, Tensor, Tensor]], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.cat(x).unflatten(0, (batch, -1)) for x in zip(*parts))


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """As kvcompress.decode_attention with logits; all in `dtype`."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    counts = [k.shape[2]] * len(q) if lengths is None else lengths.tolist()
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    groups = q.unflatten(1, (k.shape[1], -1))
    parts = [_one(groups[b, h], k[b, h], v[b, h], counts[b], scale) for b in range(len(q)) for h in range(k.shape[1])]
    return _stack(parts, len(q))


def ragged_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_start: Tensor,
    lengths: Tensor,
    *,
    max_length: int,
    softmax_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """As kvcompress.ragged_decode_attention with logits; all in `dtype`."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    heads = q.unflatten(1, (len(lengths) // len(q), -1)).flatten(0, 1)
    parts = []
    for group, start, length in zip(heads, row_start.tolist(), lengths.tolist()):
        rows = [torch.zeros(max_length, q.shape[-1], dtype=dtype, device=q.device) for _ in range(2)]
        for to, packed in zip(rows, (k, v)):
            to[:length] = packed[start : start + length]
        parts.append(_one(group, *rows, length, scale))
    return _stack(parts, len(q))
