"""compact_ and compact_ragged_ under stress on a GPU: ten thousand random rows of each, clusters and single blocks,
several streams at once.
"""

from __future__ import annotations

import pytest
import torch

import kvcompress

pytestmark = pytest.mark.cuda

STREAMS = 4
# (batch, heads, longest seq_len, rounds of calls). Many rows go to single blocks, few long ones to larger clusters.
SHAPES = [(25, 20, 700, 20), (13, 8, 5000, 6), (2, 8, 20_000, 10), (1, 2, 60_000, 10), (40, 8, 9000, 2)]


def random_index(batch: int, heads: int, seq_len: int, k: int) -> torch.Tensor:
    """[batch, heads, k] int32, ascending: each row scattered, a run that is shifted, kept at both ends, or with one entry
    dropped out of every few from somewhere on; some rows shorter.
    """
    row, slot = (batch, heads, 1), torch.arange(k, device="cuda")
    scattered = torch.rand(batch, heads, seq_len, device="cuda").argsort(-1)[..., :k].sort(-1).values
    shifted = slot + torch.randint(0, seq_len - k + 1, row, device="cuda")
    head = torch.randint(0, k + 1, row, device="cuda")
    both_ends = torch.where(slot < head, slot, slot + seq_len - k)
    first, every = torch.randint(0, k + 1, row, device="cuda"), torch.randint(2, 9, row, device="cuda")
    thinned = slot + ((slot - first).clamp(min=0) // every).clamp(max=seq_len - k)
    kind = torch.randint(0, 4, row, device="cuda")
    index = torch.stack([scattered, shifted, both_ends, thinned]).gather(0, kind.expand(batch, heads, k)[None])[0]
    counts = torch.randint(0, k + 1, row, device="cuda")
    counts = torch.where(torch.rand(row, device="cuda") < 0.3, counts, k)
    return torch.where(slot < counts, index, -1).int()


def expected(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    out, k = t.clone(), index.shape[-1]
    wide = index.long().clamp(min=0)
    kept = index >= 0
    if t.dim() == 4:
        wide, kept = wide[..., None].expand(-1, -1, -1, t.shape[-1]), kept[..., None]
    out[:, :, :k] = torch.where(kept, t.gather(2, wide), t[:, :, :k])
    return out


def run_at_once(jobs) -> None:
    """Jobs of (tensors, arguments behind them, expected), each on a stream of its own."""
    torch.cuda.synchronize()
    for stream, (op, tensors, args, _) in zip([torch.cuda.Stream() for _ in jobs], jobs):
        with torch.cuda.stream(stream):
            op(tensors, *args)
    torch.cuda.synchronize()
    for _, tensors, _, wanted in jobs:
        for t, e in zip(tensors, wanted):
            assert torch.equal(t, e)


@pytest.mark.parametrize(("batch", "heads", "longest", "rounds"), SHAPES)
def test_stress(batch, heads, longest, rounds):
    dims = [1, 3, 8, 20, 33, 64, 96, 128]
    for number in range(rounds):
        jobs = []
        for lane in range(STREAMS):
            torch.manual_seed(1000 * number + lane)
            seq_len = int(torch.randint(1 if longest < 1000 else longest // 2, longest + 1, ()))
            k = int(torch.randint(1, seq_len + 1, ())) if lane % 2 else max(1, seq_len // 4)
            index = random_index(batch, heads, seq_len, k)
            shape = (batch, heads, seq_len)
            dim = dims[(number + 3 * lane) % len(dims)] if batch * heads * longest < 10**6 else 8
            tensors = [
                torch.randn(*shape, dim, device="cuda").bfloat16(),
                torch.randint(0, 100, (*shape, dims[(number + lane) % 5]), device="cuda", dtype=torch.uint8),
                torch.arange(seq_len, device="cuda", dtype=torch.int32).expand(shape).contiguous(),
            ]
            jobs.append((kvcompress.compact_, tensors, (index,), [expected(t, index) for t in tensors]))
        run_at_once(jobs)


# (heads, longest head, rounds of calls)
RAGGED = [(500, 700, 4), (100, 5000, 4), (16, 20_000, 10), (3, 60_000, 10)]


@pytest.mark.parametrize(("heads", "longest", "rounds"), RAGGED)
def test_ragged_stress(heads, longest, rounds):
    """Heads of very different lengths with room behind each."""
    dims = [1, 3, 8, 20, 33, 64, 96, 128]
    for number in range(rounds):
        jobs = []
        for lane in range(STREAMS):
            torch.manual_seed(2000 * number + lane)
            lengths = (torch.rand(heads) ** 4 * longest).long()  # most are short
            lengths[int(torch.randint(0, heads, ()))] = longest
            stretch = lengths + int(torch.randint(0, 200, ()))
            row_start, slots = stretch.cumsum(0) - stretch, int(stretch.sum())
            kept = random_index(1, heads, longest, longest // 2)[0].cpu()
            keep = (lengths * (0.25 if lane % 2 == 0 else float(torch.rand(())))).long()
            parts = [row[(row >= 0) & (row < n)][:m] for row, n, m in zip(kept, lengths, keep)]
            indptr = torch.tensor([0, *map(len, parts)]).cumsum(0)
            index = torch.cat(parts)
            head = torch.repeat_interleave(torch.arange(heads), indptr.diff())
            to = row_start[head] + torch.arange(len(index)) - indptr[head]
            source = row_start[head] + index
            tensors = [
                torch.randn(slots, dims[(number + 3 * lane) % len(dims)], device="cuda").bfloat16(),
                torch.randint(0, 100, (slots, dims[(number + lane) % 5]), device="cuda", dtype=torch.uint8),
                torch.arange(slots, device="cuda", dtype=torch.int32),
            ]
            wanted = [t.clone() for t in tensors]
            for t, e in zip(tensors, wanted):
                e[to.cuda()] = t[source.cuda()]
            args = (index.cuda(), indptr.int().cuda(), row_start.cuda())
            jobs.append((kvcompress.compact_ragged_, tensors, args, wanted))
        run_at_once(jobs)


def test_ten_thousand_rows():
    """What the shapes above add up to: each (batch row, head) is a case of its own."""
    assert sum(batch * heads * rounds * STREAMS for batch, heads, _, rounds in SHAPES) >= 10_000
    assert sum(heads * rounds * STREAMS for heads, _, rounds in RAGGED) >= 10_000
