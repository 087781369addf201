"""Budgets in plain float64 torch."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_importance(
    before: Tensor, after: Tensor, seq_start: Tensor | None = None, is_update: bool = False
) -> Tensor:
    """As kvcompress.cosine_importance, float64."""
    if is_update:
        after = before + after  # in the dtype, as the model adds
    h, a = before.double(), after.double()
    cosine = (h * a).sum(-1) / (h.norm(dim=-1).clamp_min(1e-8) * a.norm(dim=-1).clamp_min(1e-8))
    starts = [0] * len(h) if seq_start is None else seq_start.tolist()
    return torch.stack([row[start:].mean() for row, start in zip(cosine, starts)])
