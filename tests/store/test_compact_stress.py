"""compact_ under stress on a GPU: ten thousand random rows, clusters and single blocks, several streams at once."""

from __future__ import annotations

import pytest
import torch

import kvcompress

pytestmark = pytest.mark.cuda

STREAMS = 4
# (batch, heads, longest seq_len, rounds of calls). Many rows go to single blocks, few long ones to clusters of 2 to 8.
SHAPES = [(25, 20, 700, 20), (13, 8, 5000, 6), (2, 8, 20_000, 10), (1, 2, 60_000, 10), (40, 8, 9000, 2)]


def random_index(batch: int, heads: int, seq_len: int, k: int, kind: int) -> torch.Tensor:
    """[batch, heads, k] int32, ascending: scattered, a run that is shifted, or kept at both ends; some rows shorter."""
    if kind == 0:
        index = torch.rand(batch, heads, seq_len, device="cuda").argsort(-1)[..., :k].sort(-1).values
    elif kind == 1:
        shift = torch.randint(0, seq_len - k + 1, (batch, heads, 1), device="cuda")
        index = torch.arange(k, device="cuda") + shift
    else:
        head = torch.randint(0, k + 1, (batch, heads, 1), device="cuda")
        slot = torch.arange(k, device="cuda")
        index = torch.where(slot < head, slot, slot + seq_len - k)
    counts = torch.randint(0, k + 1, (batch, heads, 1), device="cuda")
    counts = torch.where(torch.rand(batch, heads, 1, device="cuda") < 0.3, counts, k)
    return torch.where(torch.arange(k, device="cuda") < counts, index, -1).int()


def expected(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    out, k = t.clone(), index.shape[-1]
    wide = index.long().clamp(min=0)
    kept = index >= 0
    if t.dim() == 4:
        wide, kept = wide[..., None].expand(-1, -1, -1, t.shape[-1]), kept[..., None]
    out[:, :, :k] = torch.where(kept, t.gather(2, wide), t[:, :, :k])
    return out


@pytest.mark.parametrize(("batch", "heads", "longest", "rounds"), SHAPES)
def test_stress(batch, heads, longest, rounds):
    dims = [1, 3, 8, 20, 33, 64, 96, 128]
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    for number in range(rounds):
        jobs = []
        for lane in range(STREAMS):
            torch.manual_seed(1000 * number + lane)
            seq_len = int(torch.randint(1 if longest < 1000 else longest // 2, longest + 1, ()))
            k = int(torch.randint(1, seq_len + 1, ())) if lane % 2 else max(1, seq_len // 4)
            index = random_index(batch, heads, seq_len, k, (number + lane) % 3)
            shape = (batch, heads, seq_len)
            dim = dims[(number + 3 * lane) % len(dims)] if batch * heads * longest < 10**6 else 8
            tensors = [
                torch.randn(*shape, dim, device="cuda").bfloat16(),
                torch.randint(0, 100, (*shape, dims[(number + lane) % 5]), device="cuda", dtype=torch.uint8),
                torch.arange(seq_len, device="cuda", dtype=torch.int32).expand(shape).contiguous(),
            ]
            jobs.append((tensors, index, [expected(t, index) for t in tensors]))
        torch.cuda.synchronize()
        for stream, (tensors, index, _) in zip(streams, jobs):
            with torch.cuda.stream(stream):
                kvcompress.compact_(tensors, index)
        torch.cuda.synchronize()
        for tensors, _, wanted in jobs:
            for t, e in zip(tensors, wanted):
                assert torch.equal(t, e)


def test_ten_thousand_rows():
    """What the shapes above add up to: each (batch row, head) is a case of its own."""
    assert sum(batch * heads * rounds * STREAMS for batch, heads, _, rounds in SHAPES) >= 10_000
