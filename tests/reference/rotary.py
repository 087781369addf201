"""Rotary embedding in plain float64 torch (half-split layout)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """x [..., n, head_dim] rotated to positions [n]."""
    angle = positions.double()[:, None] * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    first, second = x.double().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
