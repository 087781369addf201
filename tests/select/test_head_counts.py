"""head_counts against one sorted list, and with topk_ragged against the entries it stands for."""

from __future__ import annotations

import itertools
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


def ints(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def check(scores, totals, **options):
    got = kvcompress.head_counts(scores, totals, **options)
    assert got.dtype == torch.int32
    options = {name: None if x is None else x.cpu() for name, x in options.items()}
    assert torch.equal(got.cpu(), reference.head_counts(scores.cpu(), totals.cpu(), **options))


KINDS = {
    "random": lambda shape: random(shape),
    "all_equal": lambda shape: torch.full(shape, 0.25),
    "few_values": lambda shape: random(shape).round(),
    "heads_apart": lambda shape: random(shape) + 10 * torch.arange(shape[1])[:, None],
    "narrow": lambda shape: 1 + 1e-6 * random(shape),
    "nan_and_inf": lambda shape: torch.where(
        random(shape, 1) > 1, math.nan, torch.where(random(shape, 2) > 1, -math.inf, random(shape))
    ),
    "forced": lambda shape: random(shape).index_fill(-1, torch.arange(5), math.inf),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 19])
def test_against_sort(kind, heads, device):
    seq_len = 203
    scores = KINDS[kind]((2, heads, seq_len)).to(device)
    for total in (0, 1, heads * 20, heads * seq_len - 1, heads * seq_len, heads * seq_len + 5):
        totals = ints(total, total // 2, device=device)
        check(scores, totals)
        check(scores, totals, floors=torch.full((2, heads), 7, dtype=torch.int32, device=device))


@pytest.mark.parametrize("seq_len", [1, 33, 4097])
def test_floors_and_caps(seq_len, device):
    scores = random((3, 5, seq_len)).to(device)
    floors = torch.randint(0, seq_len // 2 + 1, (3, 5), dtype=torch.int32).to(device)
    caps = torch.randint(seq_len // 3, seq_len + 2, (3, 5), dtype=torch.int32).to(device)
    totals = ints(seq_len, 3 * seq_len, 2 * seq_len, device=device)
    check(scores, totals, caps=caps)
    check(scores, totals, floors=floors, caps=caps)
    check(scores, totals, floors=caps, caps=floors)  # floors above their caps


def test_padding(device):
    scores = random((3, 4, 150)).to(device)
    start, end = ints(0, 60, 150, device=device), ints(100, 150, 150, device=device)
    check(scores, ints(90, 90, 90, device=device), seq_start=start, seq_end=end)
    floors = torch.full((3, 4), 30, dtype=torch.int32, device=device)
    check(scores, ints(150, 150, 150, device=device), floors=floors, seq_start=start, seq_end=end)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 17])
@pytest.mark.parametrize("seq_len", [40_000, 70_001])
def test_long_rows(heads, seq_len, device):
    """Many equal scores across heads, longer than a histogram has bins; several blocks may share a head."""
    scores, total = (random((1, heads, seq_len)) * 50).round().to(device), heads * 9000
    flat = scores.flatten().sort(descending=True, stable=True).indices[:total] // seq_len
    counts = kvcompress.head_counts(scores, ints(total, device=device))
    assert counts.flatten().tolist() == flat.bincount(minlength=heads).tolist()


def test_with_topk_ragged(device):
    """Counts and their entries together are the best of the row; only the total was known on the host."""
    scores, total = torch.randn(2, 8, 1000, device=device), 1500
    counts = kvcompress.head_counts(scores, ints(total, total, device=device))
    index, indptr = kvcompress.topk_ragged(scores, counts, total=2 * total)
    rows = torch.repeat_interleave(torch.arange(16, device=device), indptr.diff())
    kept = scores.flatten(0, 1)[rows, index.long()].view(2, total)
    assert torch.equal(kept.sort(-1).values, scores.flatten(1).topk(total).values.sort(-1).values)


def test_nested_in_total(device):
    """More in all is no less for any head: a later, smaller cut keeps a subset."""
    scores, floors = random((1, 7, 500)).to(device), torch.full((1, 7), 9, dtype=torch.int32, device=device)
    counts = [kvcompress.head_counts(scores, ints(n, device=device), floors=floors) for n in range(0, 3500, 90)]
    assert all((a <= b).all() for a, b in itertools.pairwise(counts))


def test_strided_views(device):
    scores = random((2, 3, 150)).to(device)
    totals = ints(100, 40, device=device)
    assert torch.equal(kvcompress.head_counts(cases.strided(scores), totals), kvcompress.head_counts(scores, totals))


def test_bitwise_run_to_run(device):
    scores, totals = random((3, 8, 3000)).to(device), ints(4000, 50, 20000, device=device)
    first = kvcompress.head_counts(scores, totals)
    assert all(torch.equal(kvcompress.head_counts(scores, totals), first) for _ in range(3))


def test_empty(device):
    for shape in [(0, 2, 8), (2, 0, 8), (2, 3, 0)]:
        totals = torch.full(shape[:1], 4, dtype=torch.int32, device=device)
        counts = kvcompress.head_counts(torch.empty(shape, device=device), totals)
        assert counts.shape == shape[:2]
        assert not counts.any()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_fuzz(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    seq_len = data.draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, *torch.randn(6, generator=generator)])
    scores = values[torch.randint(0, len(values), (batch, heads, seq_len), generator=generator)]
    totals = torch.randint(-1, heads * seq_len + 3, (batch,), generator=generator, dtype=torch.int32)
    options = {
        name: torch.randint(-2, seq_len + 3, shape, generator=generator, dtype=torch.int32)
        for name, shape in [
            ("floors", (batch, heads)),
            ("caps", (batch, heads)),
            ("seq_start", (batch,)),
            ("seq_end", (batch,)),
        ]
        if data.draw(st.booleans())
    }
    check(scores, totals, **options)


def samples(device):
    scores, floors = random((2, 3, 90)).to(device), torch.full((2, 3), 5, dtype=torch.int32, device=device)
    totals = ints(50, 100, device=device)
    return [
        (scores, totals, None, None, None, None),
        (cases.strided(scores), totals, floors, 8 * floors, ints(0, 20, device=device), ints(90, 80, device=device)),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "scores": torch.randn(2, 3, 16, device=device),
            "totals": torch.full((2,), 12, dtype=torch.int32, device=device),
            "floors": torch.full((2, 3), 2, dtype=torch.int32, device=device),
            "caps": None,
            "seq_start": torch.zeros(2, dtype=torch.int32, device=device),
            "seq_end": None,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def full(*shape, dtype=torch.int32):
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


NAME = "head_counts"
BAD = [
    Bad(
        "rank",
        wrong(scores=full(3, 16, dtype=torch.float32)),
        f"{NAME}: scores must be [batch, heads, seq_len], got 2D [3, 16]",
    ),
    Bad("dtype", wrong(scores=full(2, 3, 16, dtype=torch.float16)), f"{NAME}: scores must be float32, got float16"),
    Bad(
        "stride",
        wrong(scores=lambda d: torch.ones(2, 16, 3, device=d).mT),
        f"{NAME}: scores must be contiguous in the last dimension, got a last stride of 3",
    ),
    Bad(
        "heads",
        wrong(scores=full(2, 1025, 1, dtype=torch.float32)),
        f"{NAME}: scores must be of at most 1024 heads, got 1025",
    ),
    Bad("totals_shape", wrong(totals=full(3)), f"{NAME}: totals must be [batch] (2), got 1D [3]"),
    Bad("totals_dtype", wrong(totals=full(2, dtype=torch.int64)), f"{NAME}: totals must be int32, got int64"),
    Bad("floors_rank", wrong(floors=full(2)), f"{NAME}: floors must be [batch, heads], got 1D [2]"),
    Bad("floors_dtype", wrong(floors=full(2, 3, dtype=torch.int64)), f"{NAME}: floors must be int32, got int64"),
    Bad("caps_shape", wrong(caps=full(3, 2)), f"{NAME}: caps must be [2, 3], got [3, 2]"),
    Bad(
        "caps_stride",
        wrong(caps=lambda d: torch.ones(3, 2, dtype=torch.int32, device=d).T),
        f"{NAME}: caps must be contiguous, got strides that are not",
    ),
    Bad("start_shape", wrong(seq_start=full(3)), f"{NAME}: seq_start must be [batch] (2), got 1D [3]"),
    Bad("end_dtype", wrong(seq_end=full(2, dtype=torch.int64)), f"{NAME}: seq_end must be int32, got int64"),
    Bad(
        "total_value",
        wrong(totals=lambda d: ints(3, -1, device=d)),
        f"{NAME}: totals must be at least 0, got -1 at [1]",
        reads_data=True,
    ),
    Bad(
        "floor_value",
        wrong(floors=lambda d: ints(0, 1, 2, 3, 4, -5, device=d).view(2, 3)),
        f"{NAME}: floors must be at least 0, got -5 at [1, 2]",
        reads_data=True,
    ),
    Bad(
        "end_value",
        wrong(seq_end=lambda d: ints(17, 1, device=d)),
        f"{NAME}: seq_end must be in [0, seq_len], got 17 at [0]",
        reads_data=True,
    ),
]
