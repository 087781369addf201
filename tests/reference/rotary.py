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


def frequencies(cos: Tensor, sin: Tensor, first: int) -> Tensor:
    """inv_freq [head_dim / 2] float64 behind tables [n, head_dim] of consecutive positions from `first`.

    The turn over 1, 2, 4, ... positions, each giving the multiple of 2 pi of the next; checked against the whole tables.
    """
    half = cos.shape[1] // 2
    angle = torch.atan2(sin[:, :half].double(), cos[:, :half].double())
    found = (angle[1] - angle[0]) % (2 * torch.pi)
    found = torch.where(found > 6, found - 2 * torch.pi, found)  # slow pairs turn by rounding, forth or back
    step = 2
    while step < len(angle):
        turn = angle[step] - angle[0]
        turns = ((found * step - turn) / (2 * torch.pi)).round()
        found = (turn + 2 * torch.pi * turns) / step
        step *= 2
    expected = (torch.arange(first, first + len(cos)).double()[:, None] * found).remainder(2 * torch.pi)
    assert torch.allclose(expected.cos(), cos[:, :half].double(), atol=1e-3), "tables of another kind of rotation"
    return found
