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


def _counts(lengths: Tensor | None, batch: int, num_kv_heads: int, capacity: int) -> list[list[int]]:
    """Entries of every (row, kv head)."""
    if lengths is None:
        return [[capacity] * num_kv_heads] * batch
    return (lengths[:, None] if lengths.dim() == 1 else lengths).expand(batch, num_kv_heads).tolist()


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
    counts = _counts(lengths, len(q), k.shape[1], k.shape[2])
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    groups = q.unflatten(1, (k.shape[1], -1))
    parts = [
        _one(groups[b, h], k[b, h], v[b, h], counts[b][h], scale) for b in range(len(q)) for h in range(k.shape[1])
    ]
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


def _reduce(x: Tensor, heads: int, how: str) -> Tensor:
    """Over the query heads of each of `heads` groups: [groups of query heads, ...] -> [heads, ...]."""
    x = x.unflatten(0, (heads, -1))
    return {"mean": x.mean(1), "max": x.amax(1), "sum": x.sum(1)}[how]


def observe(
    lse: Tensor,
    logits: Tensor,
    lengths: Tensor | None,
    *,
    sums: Tensor | None = None,
    weights: Tensor | None = None,
    history: Tensor | None = None,
    seen: Tensor | None = None,
    decay: float = 1.0,
    power: int = 1,
    group_reduce: str = "mean",
    num_kv_heads: int,
) -> tuple[Tensor | None, Tensor | None]:
    """What observed_decode_attention_ leaves in dense sums and history, given what decode_attention returns."""
    batch, _, n, capacity = logits.shape
    counts = _counts(lengths, batch, num_kv_heads, capacity)
    tokens = None if seen is None else _counts(seen, batch, num_kv_heads, capacity)
    visible = logits > -INF
    shares = (logits - lse[..., None]).exp().masked_fill(~visible, 0)
    sums = None if sums is None else sums.to(logits.dtype)
    history = None if history is None else history.to(logits.dtype)
    for b in range(batch):
        if sums is not None:
            terms = _reduce(shares[b] ** power, sums.shape[1], group_reduce)
            for head, row in enumerate(sums[b]):
                h = head // (sums.shape[1] // num_kv_heads)
                term, length = torch.zeros(capacity, dtype=logits.dtype, device=logits.device), counts[b][h]
                for i in range(n):
                    term = (0 if decay == 0 else term * decay) + terms[head, i]
                term = term if weights is None else term * weights[b, h]
                old = 0 if decay == 0 else row[:length] * decay**n
                row[:length] = old + term[:length]
        if history is not None:
            columns = _reduce(logits[b], history.shape[1], group_reduce)
            for head, row in enumerate(history[b]):
                h = head // (history.shape[1] // num_kv_heads)
                for i in range(n):
                    column = (tokens[b][h] - n + i) % history.shape[3]
                    row[: counts[b][h], column] = columns[head, i, : counts[b][h]]
    return sums, history


def output_terms(
    sums: Tensor,
    out: Tensor,
    v: Tensor,
    logits: Tensor,
    lse: Tensor,
    *,
    lengths: Tensor | None = None,
    terms: tuple[str, ...] = ("value", "key", "cross"),
    decay: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What kvcompress.output_terms_ leaves in sums."""
    out, v, logits, lse, sums = (t.to(dtype) for t in (out, v, logits, lse, sums))
    batch, heads, capacity, _ = v.shape
    n = out.shape[2]
    values = v.repeat_interleave(out.shape[1] // heads, 1)
    visible = logits > -INF
    shares = (logits - lse[..., None]).exp().masked_fill(~visible, 0)
    s = logits.masked_fill(~visible, 0)
    value_square = values.square().sum(-1)[:, :, None]
    product, out_square = out @ values.mT, out.square().sum(-1, keepdim=True)
    forms = {
        "value": shares**2 * value_square,
        "key": (shares * s) ** 2 * (value_square + out_square - 2 * product),
        "cross": 2 * shares**2 * s * (value_square - product),
    }
    total = torch.stack([forms[term] for term in terms]).sum(0).masked_fill(~visible, 0)
    total = total.unflatten(1, (heads, -1)).sum(2)  # [batch, kv heads, queries, capacity]
    added = torch.zeros_like(sums)
    for i in range(n):
        added = (0 if decay == 0 else added * decay) + total[:, :, i]
    new = added if decay == 0 else sums * decay**n + added
    counts = torch.tensor(_counts(lengths, batch, heads, capacity), device=v.device)
    return torch.where(torch.arange(capacity, device=v.device) < counts[..., None], new, sums)
