"""Budget ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import kvcompress
from bench.harness import Case
from tests.cases import prompts


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    for batch, length in prompts(device, quick=quick):
        for hidden in (4096, 8192):
            if batch > 1 and length > 32768:
                continue  # 17 GB a set

            def make(batch: int = batch, length: int = length, hidden: int = hidden):
                return [torch.randn(batch, length, hidden, device=device, dtype=torch.bfloat16) for _ in range(2)]

            size = 2 * batch * length * hidden
            yield Case(
                op="cosine_importance",
                label=f"B{batch} S{length} hidden {hidden}",
                make=make,
                variants={
                    "kvcompress": lambda x: kvcompress.cosine_importance(*x),
                    "kvcompress, residual add inside": lambda x: kvcompress.cosine_importance(*x, is_update=True),
                    "torch F.cosine_similarity": lambda x: F.cosine_similarity(*x, dim=-1).mean(-1),
                },
                read=2 * size,
                footprint=2 * size,
                core=batch == 1,
                params={"batch": batch, "seq_len": length, "hidden": hidden, "dtype": "bfloat16"},
            )
