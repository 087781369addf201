"""Budget ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import kvcompress
from bench.harness import Case


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    lengths = [8192] if quick or device.type == "cpu" else [8192, 32768, 131072]
    for hidden in (4096, 8192):
        for length in lengths:
            size = length * hidden * 2

            def make(length: int = length, hidden: int = hidden):
                return [torch.randn(1, length, hidden, device=device, dtype=torch.bfloat16) for _ in range(2)]

            yield Case(
                op="cosine_importance",
                label=f"B1 S{length} hidden {hidden}",
                make=make,
                variants={
                    "kvcompress": lambda x: kvcompress.cosine_importance(*x),
                    "kvcompress, residual add inside": lambda x: kvcompress.cosine_importance(*x, is_update=True),
                    "torch F.cosine_similarity": lambda x: F.cosine_similarity(*x, dim=-1).mean(-1),
                },
                read=2 * size,
                footprint=2 * size,
                params={"batch": 1, "seq_len": length, "hidden": hidden, "dtype": "bfloat16"},
            )
