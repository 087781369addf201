"""Store ops: K and V of a Llama-3.1-8B layer, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvcompress
from bench.harness import Case
from tests.cases import HEAD_DIMS, LAYER, budgets, prompts

HEADS, DIM = LAYER.num_kv_heads, LAYER.head_dim


def random_index(batch: int, length: int, k: int, device: torch.device, heads: int = HEADS) -> torch.Tensor:
    """[batch, heads, k] int32, ascending."""
    scores = torch.rand(batch, heads, length, device=device)
    return scores.topk(k, dim=-1).indices.sort(-1).values.int()


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    for batch, length in prompts(device, quick=quick):
        for k in budgets(length):
            yield compaction(device, batch, length, k)
    for mean in (1024,) if quick or device.type == "cpu" else (1024, 8192, 32768):
        for share in (1, 10):
            yield ragged_compaction(device, mean, share)


def sweep(device: torch.device) -> Iterator[Case]:
    """64 MiB read and written each time, whatever their shape."""
    for dim in (*HEAD_DIMS, 65, 66, 100, 2, 1):
        yield moving_case(device, "head_dim", dim, dim=dim)
    for heads in (1, 2, 3, 4, 5, 7, 8, 16, 31, 64, 256):
        yield moving_case(device, "heads", heads, heads=heads)
    for times in (1.01, 1.25, 2, 3, 4, 8, 16, 64):
        yield moving_case(device, "entries for one kept", times, times=times)
    for extra in (-100, -1, 1, 3, 100):
        yield moving_case(device, "kept beyond 8192", extra, extra=extra)
    for dtype in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
        yield moving_case(device, "dtype", str(dtype).removeprefix("torch."), dtype=dtype)
    for tensors in (1, 2, 3, 4, 8):
        yield moving_case(device, "tensors", tensors, tensors=tensors)


def moving_case(
    device, swept, value, *, dim=DIM, heads=HEADS, times=4, extra=0, dtype=torch.bfloat16, tensors=2
) -> Case:
    k = 2**25 // (heads * dim * dtype.itemsize * tensors) + extra
    length = int(k * times)
    moved = tensors * heads * k * dim * dtype.itemsize

    def make():
        rows = (torch.randn(1, heads, length, dim, device=device).to(dtype) for _ in range(tensors))
        return list(rows), random_index(1, length, k, device, heads)

    return Case(
        op="compact_",
        label=f"{swept} {value}",
        make=make,
        variants={"kvcompress": lambda x: kvcompress.compact_(x[0], x[1])},
        read=moved,
        written=moved,
        footprint=2 * moved,
        params={"swept": swept, "value": value, "heads": heads, "head_dim": dim, "seq_len": length, "k": k,
                "tensors": tensors, "dtype": str(dtype).removeprefix("torch.")},
    )  # fmt: skip


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


def ragged_compaction(device: torch.device, mean: int, share: int) -> Case:
    """A packed store cut to a quarter of every head, one head with `share` times the entries of another."""
    rest = 4 * mean * HEADS // (share + HEADS - 1)
    lengths = torch.tensor([4 * mean * HEADS - rest * (HEADS - 1)] + [rest] * (HEADS - 1))
    room = 128
    starts = (lengths + room).cumsum(0) - lengths - room
    slots = int((lengths + room).sum())
    counts = lengths // 4

    def make():
        kv = [torch.randn(slots, DIM, device=device, dtype=torch.bfloat16) for _ in range(2)]
        parts = [
            random_index(1, int(n), int(k), device, heads=1).flatten()
            for n, k in zip(lengths.tolist(), counts.tolist())
        ]
        indptr = torch.tensor([0, *counts.tolist()]).cumsum(0).int().to(device)
        flat = torch.cat([part + int(start) for part, start in zip(parts, starts)]).int()[None, None]
        return kv, torch.cat(parts), indptr, starts.to(device), flat

    moved = 2 * int(counts.sum()) * DIM * 2
    return Case(
        op="compact_ragged_",
        label=f"{HEADS} heads of mean {4 * mean}, k {mean}, one head {share}x",
        make=make,
        variants={
            "kvcompress": lambda x: kvcompress.compact_ragged_(x[0], *x[1:4]),
            "kvcompress.gather into new buffers": lambda x: kvcompress.gather([t[None, None] for t in x[0]], x[4]),
        },
        read=moved,
        written=moved,
        footprint=8 * moved,
        graph=True,
        params={"mean": 4 * mean, "k": mean, "largest": share, "dtype": "bfloat16"},
    )
