"""The cases of every op, shared by tests and benchmarks: small and odd for the former, real for the latter."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def left_padding(batch: int, seq_len: int, device: str | torch.device) -> Tensor:
    """seq_start [batch] int32 with row 0 unpadded and the others ever shorter."""
    starts = [(i * seq_len) // (batch + 1) for i in range(batch)]
    return torch.tensor(starts, dtype=torch.int32, device=device)


def strided(t: Tensor) -> Tensor:
    """The same values behind other strides: rows apart, the last dimension contiguous."""
    wide = t.new_empty((*t.shape[:-2], t.shape[-2] * 2, t.shape[-1] + 8))
    view = wide[..., ::2, : t.shape[-1]]
    view.copy_(t)
    return view
