"""Scores in plain torch, float64 unless asked otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


def _visible(
    q: Tensor, k: Tensor, seq_start: Tensor | None, first_query: int, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(visible [batch, 1, window, seq_len], real [batch, window]), both bool."""
    position = (first_query + torch.arange(q.shape[2], device=q.device)).expand(q.shape[0], -1)
    position = position if positions is None else positions
    column = torch.arange(k.shape[2], device=q.device)
    start = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device) if seq_start is None else seq_start
    real = position >= start[:, None]
    visible = (column <= position[..., None]) & (column >= start[:, None])[:, None] & real[..., None]
    return visible[:, None], real


def logits(q: Tensor, k: Tensor, scale: float | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """[batch, num_q_heads, window, seq_len], nothing masked."""
    keys = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q.to(dtype) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    seq_start: Tensor | None = None,
    first_query: int | None = None,
    softmax_scale: float | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """[batch, num_q_heads, window] float32, as the prefill's attention would hand it over."""
    first_query = k.shape[2] - q.shape[2] if first_query is None else first_query
    visible, _ = _visible(q, k, seq_start, first_query, positions)
    return logits(q, k, softmax_scale, torch.float64).masked_fill(~visible, -INF).logsumexp(-1).float()


def window_scores(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    weights: Tensor | None = None,
    seq_start: Tensor | None = None,
    first_query: int | None = None,
    num_scored: int | None = None,
    window_reduce: str = "sum",
    group_reduce: str = "mean",
    pool: str = "none",
    kernel_size: int = 1,
    pool_first: bool = False,
    softmax_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """As kvcompress.window_scores."""
    batch, num_q_heads, window, _ = q.shape
    num_kv_heads, seq_len = k.shape[1:3]
    first_query = seq_len - window if first_query is None else first_query
    num_scored = min(first_query, seq_len) if num_scored is None else num_scored
    visible, real = _visible(q, k, seq_start, first_query)
    x = logits(q, k, softmax_scale, dtype).masked_fill(~visible, -INF)
    p = x.softmax(-1) if lse is None else (x - lse[..., None].to(dtype)).exp()
    p = p.masked_fill(~visible, 0)

    if window_reduce == "max":
        votes = p.amax(2)
    else:
        votes = p.sum(2)
        if window_reduce == "mean":
            votes = votes / real.sum(-1).clamp_min(1)[:, None, None]
    if weights is not None:
        votes = votes * weights.to(dtype).repeat_interleave(num_q_heads // num_kv_heads, 1)

    def group(x: Tensor) -> Tensor:
        x = x.unflatten(1, (num_kv_heads, -1))
        return {
            "none": lambda: x.flatten(1, 2),
            "mean": lambda: x.mean(2),
            "max": lambda: x.amax(2),
            "sum": lambda: x.sum(2),
        }[group_reduce]()

    def smooth(x: Tensor) -> Tensor:
        if pool == "none" or x.shape[-1] == 0:
            return x
        edge = kernel_size // 2
        padded = torch.nn.functional.pad(x, (edge, edge), value=-INF if pool == "max" else 0)
        spans = padded.unfold(-1, kernel_size, 1)
        return spans.amax(-1) if pool == "max" else spans.sum(-1) / kernel_size

    out = []
    for b in range(batch):
        start = 0 if seq_start is None else int(seq_start[b])
        row = votes[b : b + 1, :, start : max(num_scored, start)]
        row = group(smooth(row)) if pool_first else smooth(group(row))
        row = torch.nn.functional.pad(row, (start, 0), value=-INF)
        out.append(torch.nn.functional.pad(row, (0, seq_len - row.shape[-1]), value=INF))
    heads = num_q_heads if group_reduce == "none" else num_kv_heads
    return torch.cat(out) if out else q.new_zeros((0, heads, seq_len), dtype=dtype)


def history_scores(
    history: Tensor,
    positions: Tensor,
    lengths: Tensor,
    seen: Tensor,
    *,
    window: int = 0,
    fuse: str = "sum",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """As kvcompress.history_scores."""
    each = history.shape[1] // positions.shape[1]
    slot = torch.arange(history.shape[2], device=history.device)
    candidates = (slot < lengths[..., None]) & (positions < seen[..., None] - window)
    candidates = candidates.repeat_interleave(each, 1)[..., None]
    logits = history.to(dtype).masked_fill(~candidates, -INF)
    shares = logits.softmax(2).where(logits.amax(2, keepdim=True) > -INF, 0).masked_fill(~candidates, 0)
    return shares.sum(3) if fuse == "sum" else shares.amax(3)


def column_sums(
    q: Tensor,
    k: Tensor,
    *,
    statistic: str = "sum",
    group_reduce: str = "mean",
    lse: Tensor | None = None,
    query_weights: Tensor | None = None,
    query_positions: Tensor | None = None,
    seq_start: Tensor | None = None,
    v: Tensor | None = None,
    output: Tensor | None = None,
    first_query: int | None = None,
    softmax_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """As kvcompress.column_sums."""
    per_kv = q.shape[1] // k.shape[1]
    first_query = k.shape[2] - q.shape[2] if first_query is None and query_positions is None else first_query or 0
    visible, _ = _visible(q, k, seq_start, first_query, query_positions)
    s = logits(q, k, softmax_scale, dtype)
    x = s.masked_fill(~visible, -INF)
    p = x.softmax(-1) if lse is None else (x - lse[..., None].to(dtype)).exp()
    p = p.masked_fill(~visible, 0)  # softmax of a row that sees nothing is NaN
    if query_weights is not None:
        p = p * query_weights[..., None].to(dtype)
    seen = visible.sum(2)
    if statistic in ("key_change", "joint_change", "cross_change"):
        values, o = v.to(dtype).repeat_interleave(per_kv, 1), output.to(dtype)
        along, o_square = o @ values.mT, o.square().sum(-1, keepdim=True)  # [batch, num_q_heads, window, seq_len or 1]
        v_square = values.square().sum(-1)[:, :, None]
        key = (p * s).square() * (v_square + o_square - 2 * along)
        cross = 2 * p.square() * s * (v_square - along)
        joint = p.square() * v_square + key + cross
        terms = {"key_change": key, "cross_change": cross, "joint_change": joint}[statistic]
        sums = terms.masked_fill(~visible, 0).sum(2)
    else:
        sums = {
            "sum": lambda: p.sum(2),
            "mean": lambda: p.sum(2) / seen.clamp_min(1),
            "sum_squares": lambda: p.square().sum(2),
            "max": lambda: p.masked_fill(~visible, -INF).amax(2).clamp_min(0),
        }[statistic]()
    grouped = sums.unflatten(1, (k.shape[1], per_kv))
    out = {
        "none": lambda: sums,
        "mean": lambda: grouped.mean(2),
        "max": lambda: grouped.amax(2),
        "sum": lambda: grouped.sum(2),
    }[group_reduce]()
    if seq_start is None:
        return out
    padding = torch.arange(k.shape[2], device=k.device) < seq_start[:, None]
    return out.masked_fill(padding[:, None], -INF)
