"""Store ops: K and V of a Llama-3.1-8B layer, 8 kv heads, head_dim 128, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvcompress
from bench.harness import Case

HEADS, DIM = 8, 128


def random_index(batch: int, length: int, k: int, device: torch.device) -> torch.Tensor:
    scores = torch.rand(batch, HEADS, length, device=device)
    return scores.topk(k, dim=-1).indices.sort(-1).values.int()


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    shapes = [(1, 8192), (1, 32768), (1, 131072), (8, 32768)]
    if quick or device.type == "cpu":
        shapes = [(1, 8192)]
    for batch, length in shapes:
        for k in (1024, length // 4):

            def make(batch: int = batch, length: int = length, k: int = k):
                kv = [torch.randn(batch, HEADS, length, DIM, device=device, dtype=torch.bfloat16) for _ in range(2)]
                index = random_index(batch, length, k, device)
                spare = [torch.empty(batch, HEADS, k, DIM, device=device, dtype=torch.bfloat16) for _ in range(2)]
                return kv, index, index.long()[..., None].expand(-1, -1, -1, DIM), spare

            def plain_copy(x, k: int = k) -> None:
                for source, target in zip(x[0], x[3]):
                    target.copy_(source[:, :, -k:])

            def torch_gather(x) -> list[torch.Tensor]:
                return [t.gather(2, x[2]) for t in x[0]]

            moved = 2 * batch * HEADS * k * DIM * 2
            # compact_ again on compacted rows moves as many bytes from the same places, so nothing is restored
            yield Case(
                "compact_, gather",
                f"B{batch} S{length} k {k}",
                make,
                {
                    "kvcompress.compact_": lambda x: kvcompress.compact_(x[0], x[1]),
                    "kvcompress.gather": lambda x: kvcompress.gather(x[0], x[1]),
                    "torch.gather": torch_gather,
                    "plain copy of the bytes": plain_copy,
                },
                read=moved,
                written=moved,
                footprint=2 * moved,
                params={
                    "batch": batch,
                    "seq_len": length,
                    "k": k,
                    "heads": HEADS,
                    "head_dim": DIM,
                    "dtype": "bfloat16",
                },
            )
