"""Decode attention of one token, on a Llama-3.1-8B layer: 32 query heads, 8 kv heads, head_dim 128, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import kvcompress
from bench.harness import Case

Q_HEADS, KV_HEADS, DIM = 32, 8, 128


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    shapes = [(1, 1024), (1, 8192), (1, 32768), (8, 32768), (64, 1024)]
    if quick or device.type == "cpu":
        shapes = [(1, 8192)]
    for batch, length in shapes:

        def make(batch: int = batch, length: int = length):
            q = torch.randn(batch, Q_HEADS, 1, DIM, device=device, dtype=torch.bfloat16)
            k, v = (torch.randn(batch, KV_HEADS, length, DIM, device=device, dtype=torch.bfloat16) for _ in range(2))
            # ragged: the same entries in all, head 0 with ten times the share of the others
            share = length * KV_HEADS // (KV_HEADS + 9)
            lengths = ([length * KV_HEADS - share * (KV_HEADS - 1)] + [share] * (KV_HEADS - 1)) * batch
            ends = torch.tensor(lengths, device=device)
            starts = ends.cumsum(0) - ends
            packed = [t.reshape(-1, DIM) for t in (k, v)]
            return q, k, v, packed, starts, ends.int(), max(lengths)

        def sdpa(x) -> torch.Tensor:
            return F.scaled_dot_product_attention(x[0].view(-1, KV_HEADS, Q_HEADS // KV_HEADS, DIM), x[1], x[2])

        def ragged(x) -> object:
            return kvcompress.ragged_decode_attention(x[0], *x[3], x[4], x[5], max_length=x[6])

        size = 2 * batch * KV_HEADS * length * DIM * 2
        yield Case(
            op="decode_attention",
            label=f"B{batch} {length} entries a head",
            make=make,
            variants={
                "kvcompress": lambda x: kvcompress.decode_attention(x[0], x[1], x[2]),
                "kvcompress, ragged 10 : 1": ragged,
                "torch SDPA, group folded": sdpa,
            },
            read=size,
            footprint=size,
            graph=True,
            core=True,
            params={"batch": batch, "entries": length, "dtype": "bfloat16"},
        )
