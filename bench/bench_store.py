"""Store ops: K and V of a Llama-3.1-8B layer, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvcompress
from bench.harness import Case
from tests.cases import LAYER, budgets, prompts

HEADS, DIM = LAYER.num_kv_heads, LAYER.head_dim


def random_index(batch: int, length: int, k: int, device: torch.device, heads: int = HEADS) -> torch.Tensor:
    """[batch, heads, k] int32, ascending."""
    scores = torch.rand(batch, heads, length, device=device)
    return scores.topk(k, dim=-1).indices.sort(-1).values.int()


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    for batch, length in prompts(device, quick=quick):
        for k in budgets(length):
            yield compaction(device, batch, length, k)


def compaction(device: torch.device, batch: int, length: int, k: int) -> Case:
    def make():
        kv = [torch.randn(batch, HEADS, length, DIM, device=device, dtype=torch.bfloat16) for _ in range(2)]
        index = random_index(batch, length, k, device)
        spare = [torch.empty(batch, HEADS, k, DIM, device=device, dtype=torch.bfloat16) for _ in range(2)]
        return kv, index, index.long()[..., None].expand(-1, -1, -1, DIM), spare

    def plain_copy(x) -> None:
        for source, target in zip(x[0], x[3]):
            target.copy_(source[:, :, -k:])

    moved = 2 * batch * HEADS * k * DIM * 2
    return Case(
        op="compact_, gather",
        label=f"B{batch} S{length} k {k}",
        make=make,
        variants={
            # again on compacted rows it moves as many bytes from the same places: nothing needs restoring
            "kvcompress": lambda x: kvcompress.compact_(x[0], x[1]),
            "kvcompress.gather": lambda x: kvcompress.gather(x[0], x[1]),
            "torch.gather": lambda x: [t.gather(2, x[2]) for t in x[0]],
            "plain copy of the bytes": plain_copy,
        },
        read=moved,
        written=moved,
        footprint=2 * moved,
        graph=True,
        core=True,
        params={"batch": batch, "seq_len": length, "k": k, "dtype": "bfloat16"},
    )
