"""topk_ragged against one sort a head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import select as reference


def random(shape, seed=0):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(scores.abs() < 0.1, scores.round(), scores)  # ties, and zeros of both signs


def check(scores, counts, total, **options):
    index, indptr = kvcompress.topk_ragged(scores, counts, total=total, **options)
    options = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    expected = reference.topk_ragged(scores.cpu(), counts.cpu(), total, **options)
    assert index.dtype == indptr.dtype == torch.int32
    assert torch.equal(indptr.cpu(), expected[1])
    assert torch.equal(index.cpu(), expected[0])


def ints(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("seq_len", [1, 33, 700, 5003])
def test_against_sort(seq_len, device):
    scores = random((2, 3, seq_len)).to(device)
    counts = torch.randint(0, seq_len + 1, (2, 3), dtype=torch.int32)
    check(scores, counts.to(device), int(counts.sum()))
    check(scores, counts.to(device), int(counts.sum()), sink=2, window=5)


def test_empty_and_full_heads(device):
    scores = random((2, 4, 300)).to(device)
    counts = torch.tensor([[0, 300, 0, 7], [300, 0, 1, 0]], dtype=torch.int32, device=device)
    check(scores, counts, 608, sink=1, window=3)


def test_padding(device):
    scores = random((3, 2, 200)).to(device)
    start, end = ints(0, 50, 200, device=device), ints(200, 180, 200, device=device)
    counts = torch.tensor([[20, 30], [130, 140], [9, 9]], dtype=torch.int32, device=device)
    check(scores, counts, 20 + 30 + 130 + 130, sink=4, window=8, seq_start=start, seq_end=end)


def test_total_too_small_or_large(device):
    """Rows that do not fit are cut short by score; nothing is written behind the buffer."""
    scores = random((1, 3, 100)).to(device)
    counts = torch.tensor([[20, 30, 40]], dtype=torch.int32, device=device)
    for total in (0, 1, 20, 45, 89):
        index, indptr = kvcompress.topk_ragged(scores, counts, total=total)
        bounds = [0, 20, 50, 90]
        assert indptr.tolist() == [min(x, total) for x in bounds]
        for h in range(3):
            n = min(bounds[h + 1], total) - min(bounds[h], total)
            own = kvcompress.topk(scores[:, h : h + 1], n).flatten()
            assert torch.equal(index[indptr[h] : indptr[h + 1]], own)
    check(scores, counts, 120)


def test_many_heads_and_a_long_row(device):
    counts = torch.randint(0, 40, (5, 70), dtype=torch.int32)
    check(random((5, 70, 60)).to(device), counts.to(device), int(counts.clamp(max=60).sum()))
    scores = (torch.randn(1, 2, 100_000) * 50).round().to(device)
    counts = ints(70_000, 30_001, device=device)[None]
    index, indptr = kvcompress.topk_ragged(scores, counts, total=100_001)
    assert indptr.tolist() == [0, 70_000, 100_001]
    for h, own in enumerate((index[:70_000], index[70_000:])):
        assert torch.equal(own, kvcompress.topk(scores[:, h : h + 1], len(own)).flatten())


def test_strided_views(device):
    scores, counts = random((2, 3, 150)).to(device), torch.randint(0, 150, (3, 2), dtype=torch.int32)
    total = int(counts.sum())
    expected = kvcompress.topk_ragged(scores, counts.T.contiguous().to(device), total=total)
    got = kvcompress.topk_ragged(cases.strided(scores), counts.to(device).T, total=total)
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


def test_bitwise_run_to_run(device):
    scores, counts = random((2, 8, 3000)).to(device), torch.randint(0, 3000, (2, 8), dtype=torch.int32)
    run = lambda: kvcompress.topk_ragged(scores, counts.to(device), total=int(counts.sum()), window=16)  # noqa: E731
    first = run()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(run(), first))


def test_empty(device):
    for shape in [(0, 2, 8), (2, 0, 8), (2, 3, 0)]:
        counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        index, indptr = kvcompress.topk_ragged(torch.empty(shape, device=device), counts, total=2)
        assert index.tolist() == [-1, -1]
        assert indptr.tolist() == [0] * (shape[0] * shape[1] + 1)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_fuzz(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    seq_len = data.draw(st.integers(1, 120))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 2.0, *torch.randn(5, generator=generator)])
    scores = values[torch.randint(0, len(values), (batch, heads, seq_len), generator=generator)]
    counts = torch.randint(-1, seq_len + 3, (batch, heads), generator=generator, dtype=torch.int32)
    vectors = {
        name: torch.randint(-2, seq_len + 3, (batch,), generator=generator, dtype=torch.int32)
        for name in ("seq_start", "seq_end")
        if data.draw(st.booleans())
    }
    total = batch * heads * seq_len
    check(scores, counts, total, sink=data.draw(st.integers(0, 9)), window=data.draw(st.integers(0, 9)), **vectors)


def samples(device):
    scores, counts = random((2, 3, 90)).to(device), ints(5, 0, 90, 7, 30, 1, device=device).view(2, 3)
    start, end = ints(0, 20, device=device), ints(90, 85, device=device)
    return [(scores, counts, None, None, 133, 0, 0), (cases.strided(scores), counts, start, end, 133, 2, 4)]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "scores": torch.randn(2, 3, 16, device=device),
            "counts": torch.full((2, 3), 4, dtype=torch.int32, device=device),
            "seq_start": torch.zeros(2, dtype=torch.int32, device=device),
            "seq_end": None,
            "total": 24,
            "sink": 1,
            "window": 2,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def full(*shape, dtype=torch.int32):
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


NAME = "topk_ragged"
BAD = [
    Bad(
        "rank",
        wrong(scores=full(3, 16, dtype=torch.float32)),
        f"{NAME}: scores must be [batch, heads, seq_len], got 2D [3, 16]",
    ),
    Bad("dtype", wrong(scores=full(2, 3, 16, dtype=torch.float64)), f"{NAME}: scores must be float32, got float64"),
    Bad(
        "stride",
        wrong(scores=lambda d: torch.ones(2, 16, 3, device=d).mT),
        f"{NAME}: scores must be contiguous in the last dimension, got a last stride of 3",
    ),
    Bad("counts_rank", wrong(counts=full(2)), f"{NAME}: counts must be [batch, heads], got 1D [2]"),
    Bad("counts_dtype", wrong(counts=full(2, 3, dtype=torch.int64)), f"{NAME}: counts must be int32, got int64"),
    Bad("counts_shape", wrong(counts=full(3, 2)), f"{NAME}: counts must be [2, 3], got [3, 2]"),
    Bad("start_shape", wrong(seq_start=full(3)), f"{NAME}: seq_start must be [batch] (2), got 1D [3]"),
    Bad("end_dtype", wrong(seq_end=full(2, dtype=torch.int64)), f"{NAME}: seq_end must be int32, got int64"),
    Bad("total_negative", wrong(total=-1), f"{NAME}: total must be in [0, 2147483647], got -1"),
    Bad("total_over", wrong(total=2**31), f"{NAME}: total must be in [0, 2147483647], got 2147483648"),
    Bad("sink_negative", wrong(sink=-2), f"{NAME}: sink must be at least 0, got -2"),
    Bad("window_negative", wrong(window=-1), f"{NAME}: window must be at least 0, got -1"),
    Bad(
        "count_value",
        wrong(counts=lambda d: torch.tensor([[1, 2, 3], [4, -5, 6]], dtype=torch.int32, device=d)),
        f"{NAME}: counts must be at least 0, got -5 at [1, 1]",
        reads_data=True,
    ),
    Bad(
        "start_value",
        wrong(seq_start=lambda d: ints(0, 17, device=d)),
        f"{NAME}: seq_start must be in [0, seq_len], got 17 at [1]",
        reads_data=True,
    ),
]
