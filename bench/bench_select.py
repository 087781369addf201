"""Selection ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvcompress
from bench.harness import Case


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    shapes = [(8, 8192), (8, 32768), (8, 131072), (64, 32768), (64, 131072), (256, 32768)]
    if quick or device.type == "cpu":
        shapes = [(8, 8192), (8, 32768)]
    try:
        import flashinfer
    except ImportError:
        flashinfer = None
    for rows, length in shapes:
        for k in (1024, length // 4):

            def make(rows: int = rows, length: int = length):
                return torch.randn(rows // 8, 8, length, device=device)

            variants = {
                "kvcompress": lambda x, k=k: kvcompress.topk(x, k),
                "torch.topk (unordered)": lambda x, k=k: torch.topk(x, k, dim=-1, sorted=False).indices,
                "torch.topk + sort": lambda x, k=k: torch.topk(x, k, dim=-1, sorted=False).indices.sort(-1).values,
            }
            if flashinfer is not None:
                variants["flashinfer.top_k (unordered)"] = lambda x, k=k: flashinfer.top_k(x.flatten(0, 1), k)
            size = 4 * rows * length
            yield Case(
                "topk",
                f"rows {rows} S{length} k {k}",
                make,
                variants,
                read=size + 4 * rows * k,
                footprint=size,
                params={"rows": rows, "seq_len": length, "k": k},
            )
