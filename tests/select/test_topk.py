"""topk against a plain sort, and its promises: the set, the tie rule, the order."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import select as reference


def check(scores, k, **options):
    out = kvcompress.topk(scores, k, **options)
    assert out.dtype == torch.int32
    expected = reference.topk(scores.cpu(), k, **options)
    assert torch.equal(out.cpu(), expected)


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_values(shape, share, *values):
    """Random scores of which a share is each of `values`."""
    scores = random(shape)
    dice = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    for i, value in enumerate(values):
        scores[(dice >= i * share) & (dice < (i + 1) * share)] = value
    return scores


def bits(shape, low, high):
    """Scores whose uint32 patterns lie in [low, high)."""
    return torch.randint(low, high, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0)).view(
        torch.float32
    )


KINDS = {
    "random": lambda shape: random(shape),
    "probabilities": lambda shape: random(shape).mul(4).softmax(-1),
    "all_equal": lambda shape: torch.full(shape, 0.25),
    "few_values": lambda shape: random(shape).round(),
    "zeros_of_both_signs": lambda shape: with_values(shape, 0.3, 0.0, -0.0),
    "leading_11_bits_equal": lambda shape: bits(shape, 0x3F800000, 0x3F9FFFFF),
    "leading_22_bits_equal": lambda shape: bits(shape, 0x3F800000, 0x3F8003FF),
    "negative_leading_bits_equal": lambda shape: -bits(shape, 0x3F800000, 0x3F8003FF),
    "ascending": lambda shape: random(shape).sort(-1).values,
    "descending": lambda shape: random(shape).sort(-1, descending=True).values,
    "narrow": lambda shape: 1 + 1e-6 * random(shape),
    "denormal": lambda shape: bits(shape, 1, 0x00000FFF),
    "infinities": lambda shape: with_values(shape, 0.2, math.inf, -math.inf),
    "all_minus_inf": lambda shape: torch.full(shape, -math.inf),
    "nan_some": lambda shape: with_values(shape, 0.2, math.nan, -math.nan, -math.inf),
    "nan_most": lambda shape: with_values(shape, 0.45, math.nan, -math.inf),
    "nan_all": lambda shape: torch.full(shape, math.nan),
    "every_bit_pattern": lambda shape: bits(shape, -(2**31), 2**31 - 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 2, 700), (1, 5, 2500), (1, 2, 9000)])
def test_against_sort(kind, shape, device):
    scores, size = KINDS[kind](shape).to(device), shape[-1]
    for k in (0, 1, 63, size // 2, size - 1, size):
        check(scores, k)
        if k >= 63:
            check(scores, k, sink=4, window=32)


@pytest.mark.parametrize("seq_len", [1, 2, 31, 32, 33, 63, 64, 65, 127, 1000, 2047, 4097, 8191, 12289, 30011, 70001])
def test_sizes(seq_len, device):
    scores = with_values((1, 2, seq_len), 0.1, 0.5, math.nan).to(device)
    for k in sorted({0, 1, seq_len // 4, seq_len // 2, seq_len - 1, seq_len}):
        check(scores, k)
    check(scores.round(), seq_len // 3)


@pytest.mark.parametrize("kind", ["random", "half_minus_inf", "few_values", "nan"])
@pytest.mark.parametrize("size", [255, 256, 257, 512, 513, 1024, 1025, 2048, 2049, 4096, 4097, 8192])
def test_rows_in_registers(kind, size, device):
    """Around the sizes from which on a row takes more registers or warps; its rows begin anywhere."""
    scores = (against_sample if kind == "nan" else as_in_use)(kind, (1, 7, size + 1))[..., 1:]
    for k in (1, size // 4, size - 1):
        assert torch.equal(kvcompress.topk(scores.to(device), k).cpu(), by_sort(scores, k))


def test_many_rows(device):
    check(random((3, 67, 130)).to(device), 40, sink=2, window=3)


def test_long_row(device):
    """More entries than shared memory holds, with ties across the whole row."""
    scores = (random((1, 1, 600_000)) * 50).round()
    k = 100_000
    index = kvcompress.topk(scores.to(device), k, sink=1, window=2).cpu()[0, 0].long()
    values = scores[0, 0].clone()
    values[0] = values[-2:] = math.inf
    order = values.sort(descending=True, stable=True).indices[:k]
    assert torch.equal(index, order.sort().values)


def sampled(size, count):
    """The places where the CUDA kernels take their sample of a row (csrc/select/row_sample.cuh)."""
    i = torch.arange(count)
    stretch = 2**32 // count
    return (i * stretch + i * 0x9E3779B9 % stretch) * size >> 32


def against_sample(kind, shape):
    """Scores of which a sample says nothing, or what is wrong."""
    scores, size = random(shape), shape[-1]
    places = torch.cat([sampled(size, 512), sampled(size, 1024)])
    if kind == "too_high":
        scores[..., places] += 100
    elif kind == "too_low":
        scores[..., places] -= 100
    elif kind == "crowded":  # far more between the cut's ends than it says, hardly any of them equal
        crowd = 0.674 + 1e-3 * random(shape, seed=1)
        crowd[..., places] = scores[..., places]
        scores = crowd
    elif kind == "tied":  # one value that the sample does not know
        tied = torch.full(shape, 0.674)
        tied[..., places] = scores[..., places]
        scores = tied
    elif kind == "nan":
        nan = torch.full(shape, math.nan)
        nan[..., places] = scores[..., places]
        scores = nan
    return scores


def by_sort(scores, k):
    """The reference at sizes where one in plain Python takes too long: no NaN but below all numbers."""
    rank = torch.where(scores.isnan(), -math.inf, scores)
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return order.sort(-1).values.to(torch.int32)


@pytest.mark.parametrize("kind", ["too_high", "too_low", "crowded", "tied", "nan"])
@pytest.mark.parametrize("size", [1500, 9000, 40_000])
def test_against_sample(kind, size, device):
    scores = against_sample(kind, (1, 2, size))
    for k in (1, 300, size // 4, size - 300):
        assert torch.equal(kvcompress.topk(scores.to(device), k).cpu(), by_sort(scores, k))


def as_in_use(kind, shape):
    scores = random(shape)
    if kind == "sums_of_attention":  # within a factor of two of each other, and smooth
        scores = torch.nn.functional.avg_pool1d(scores.mul(0.2).exp(), 5, 1, 2) / shape[-1]
    elif kind == "half_minus_inf":
        scores[random(shape, 1) < 0] = -math.inf
    elif kind == "few_values":
        scores = (scores * 10).round()
    elif kind == "ascending":
        scores = scores.sort(-1).values
    return scores


IN_USE = ["random", "sums_of_attention", "half_minus_inf", "few_values", "ascending"]


@pytest.mark.parametrize("kind", IN_USE)
@pytest.mark.parametrize("shape", [(1, 8, 33_000), (1, 70, 9001), (2, 1, 300_000)])
def test_slices(kind, shape, device):
    """Rows that several blocks share, and what they look like in use."""
    scores = as_in_use(kind, shape)
    for k in (1024, shape[-1] // 4, shape[-1] // 2 + 100):
        assert torch.equal(kvcompress.topk(scores.to(device), k).cpu(), by_sort(scores, k))


@pytest.mark.parametrize("kind", [*IN_USE, "too_high", "too_low", "crowded", "tied", "nan"])
@pytest.mark.parametrize(("shape", "k"), [((1, 70, 45_007), 1024), ((2, 20, 90_001), 1024), ((1, 1, 330_000), 300)])
def test_slices_read_once(kind, shape, k, device):
    """Long slices and few kept: the cut comes from the sample, and is made anew where that is no good."""
    if kind in IN_USE:
        scores = as_in_use(kind, shape)
        got = kvcompress.topk(scores.to(device), k, sink=3, window=5).cpu()
        scores[..., :3] = scores[..., -5:] = math.inf
    else:
        scores = against_sample(kind, shape)
        got = kvcompress.topk(scores.to(device), k).cpu()
    assert torch.equal(got, by_sort(scores, k))


def test_around_zero(device):
    """Zero as the least and as the largest of what is left when the threshold is sought: -0 is no key of its own."""
    for size in (1500, 40_000):
        scores = random((1, 2, size)).abs()
        scores[..., ::5] *= -1
        scores[..., 1::3] = 0.0
        scores[..., 2::6] = -0.0
        tiny = bits((1, 2, size), 1, 4) * torch.where(random((1, 2, size)) < 0, -1.0, 1.0)  # next to zero
        tiny[..., ::4] = 0.0
        for x in (scores, tiny):
            for k in range(1, size, size // 8):
                assert torch.equal(kvcompress.topk(x.to(device), k).cpu(), by_sort(x, k))


@pytest.mark.parametrize("size", [4_000_000])
def test_very_long_row(size, device):
    """More entries than shared memory has bits for."""
    scores = random((1, 1, size))
    scores[..., ::7] = 0.5
    assert torch.equal(kvcompress.topk(scores.to(device), size // 3).cpu(), by_sort(scores, size // 3))


@pytest.mark.cuda
def test_without_clusters():
    """The forms that a device before sm_90 gets, on this one."""
    chosen = "sizes or sample or slices or long or many or padding or run_to_run or lengths or registers"
    files = ["tests/select/test_topk.py", "tests/select/test_topk_ragged.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-k", chosen, "-p", "no:cacheprovider", *files]
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(command, cwd=root, env={**os.environ, "KVCOMPRESS_SM": "80"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


def rows(device):
    batch, seq_len = 5, 300
    start = torch.tensor([0, 10, 200, 299, 300], dtype=torch.int32, device=device)
    end = torch.tensor([300, 250, 230, 300, 300], dtype=torch.int32, device=device)
    counts = torch.tensor([0, 100, 7, 50, 3], dtype=torch.int32, device=device)
    return with_values((batch, 3, seq_len), 0.1, math.nan, 0.0).to(device), start, end, counts


@pytest.mark.parametrize("k", [1, 50, 120])
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (1, 0), (0, 1), (4, 40), (40, 10)])
def test_rows_of_different_lengths(k, sink, window, device):
    sink, window = min(sink, k), min(window, k - min(sink, k))
    scores, start, end, counts = rows(device)
    check(scores, k, sink=sink, window=window, seq_start=start)
    check(scores, k, sink=sink, window=window, seq_end=end)
    check(scores, k, sink=sink, window=window, seq_start=start, seq_end=end)
    check(scores, k, sink=sink, window=window, counts=counts)
    check(scores, k, sink=sink, window=window, counts=counts, seq_start=start, seq_end=end)


def test_vectors_are_clamped(device):
    scores = random((4, 2, 50)).to(device)
    wild = [
        torch.tensor(v, dtype=torch.int32, device=device)
        for v in ([-5, 70, 20, 3], [60, -1, 10, 2**31 - 1], [-1, 5, 9, 99])
    ]
    check(scores, 20, sink=3, window=2, seq_start=wild[0], seq_end=wild[1], counts=wild[2])


def test_promised_set(device):
    """No entry left out has a larger score than one kept."""
    scores = random((2, 4, 5000)).to(device)
    index = kvcompress.topk(scores, 1000).long()
    kept = scores.gather(-1, index)
    assert torch.equal(kept.sort(-1, descending=True).values, scores.topk(1000).values)


def test_promised_ties(device):
    """Of equal scores at the cut, the smaller positions are kept; of forced entries too."""
    scores = torch.zeros(1, 1, 400, device=device)
    scores[..., 100::3] = 1.0  # 100 of them
    index = kvcompress.topk(scores, 150)[0, 0].tolist()
    zeros = [i for i in index if i < 100 or (i - 100) % 3]
    assert zeros == list(range(50))
    counts = torch.tensor([5], dtype=torch.int32, device=device)
    assert (
        kvcompress.topk(scores, 20, sink=2, window=8, counts=counts)[0, 0].tolist() == [0, 1, 392, 393, 394] + [-1] * 15
    )


def test_promised_order(device):
    index = kvcompress.topk(with_values((3, 5, 3001), 0.2, 1.0).to(device), 777)
    assert (index.diff() > 0).all()


def test_strided_views(device):
    scores = random((3, 4, 257)).to(device)
    expected = kvcompress.topk(scores, 100)
    assert torch.equal(kvcompress.topk(cases.strided(scores), 100), expected)
    assert torch.equal(kvcompress.topk(scores.transpose(0, 1), 100), expected.transpose(0, 1))
    assert torch.equal(kvcompress.topk(scores[:, :1].expand(3, 4, 257), 100)[:, 3], expected[:, 0])
    odd = torch.empty(3 * 4 * 257 + 1, device=device)[1:].view(3, 4, 257).copy_(scores)
    assert torch.equal(kvcompress.topk(odd, 100), expected)


def test_64_bit_offsets(device):
    scores = cases.far_apart((2, 2, 300), torch.float32, device, 2**31 + 16)
    scores.copy_(random((2, 2, 300)))
    assert torch.equal(kvcompress.topk(scores, 100), kvcompress.topk(scores.contiguous(), 100))


def test_nested_in_k(device):
    scores = with_values((1, 2, 2000), 0.2, 0.5).to(device)
    large, small = (kvcompress.topk(scores, k).cpu() for k in (900, 300))
    for h in range(2):
        assert set(small[0, h].tolist()) <= set(large[0, h].tolist())


def test_bitwise_run_to_run(device):
    scores = with_values((2, 8, 9000), 0.2, 0.5, math.nan).to(device)
    first = kvcompress.topk(scores, 2500, window=32)
    assert all(torch.equal(kvcompress.topk(scores, 2500, window=32), first) for _ in range(5))


def test_empty(device):
    for shape, k in [((0, 2, 8), 3), ((2, 0, 8), 3), ((2, 3, 0), 0), ((2, 3, 8), 0)]:
        assert kvcompress.topk(torch.empty(shape, device=device), k).shape == (*shape[:2], k)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_fuzz(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    seq_len = data.draw(st.integers(1, 200))
    k = data.draw(st.integers(0, seq_len))
    sink = data.draw(st.integers(0, k))
    window = data.draw(st.integers(0, k - sink))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))
    seed = data.draw(st.integers(0, 9999))
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat(
        [torch.randn(levels, generator=generator), torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])]
    )
    scores = values[torch.randint(0, len(values), (batch, heads, seq_len), generator=generator)]
    vectors = {
        name: torch.randint(-2, seq_len + 3, (batch,), generator=generator, dtype=torch.int32)
        for name in ("counts", "seq_start", "seq_end")
        if data.draw(st.booleans())
    }
    check(scores, k, sink=sink, window=window, **vectors)


def samples(device):
    scores, start, end, counts = rows(device)
    return [
        (scores, None, None, None, 40, 0, 0),
        (scores, counts, start, end, 40, 4, 8),
        (cases.strided(scores), None, start, None, 300, 0, 32),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "scores": torch.randn(2, 3, 16, device=device),
            "counts": None,
            "seq_start": torch.zeros(2, dtype=torch.int32, device=device),
            "seq_end": None,
            "k": 8,
            "sink": 2,
            "window": 4,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def full(*shape, dtype=torch.float32):
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


def ints(*values):
    return lambda device: torch.tensor(values, dtype=torch.int32, device=device)


NAME = "topk"
BAD = [
    Bad("rank", wrong(scores=full(3, 16)), f"{NAME}: scores must be [batch, heads, seq_len], got 2D [3, 16]"),
    Bad("dtype", wrong(scores=full(2, 3, 16, dtype=torch.bfloat16)), f"{NAME}: scores must be float32, got bfloat16"),
    Bad(
        "stride",
        wrong(scores=lambda d: torch.ones(2, 16, 3, device=d).mT),
        f"{NAME}: scores must be contiguous in the last dimension, got a last stride of 3",
    ),
    Bad("counts_shape", wrong(counts=full(3, dtype=torch.int32)), f"{NAME}: counts must be [batch] (2), got 1D [3]"),
    Bad("counts_dtype", wrong(counts=full(2, dtype=torch.int64)), f"{NAME}: counts must be int32, got int64"),
    Bad(
        "seq_start_rank",
        wrong(seq_start=full(2, 1, dtype=torch.int32)),
        f"{NAME}: seq_start must be [batch] (2), got 2D [2, 1]",
    ),
    Bad("seq_end_dtype", wrong(seq_end=full(2)), f"{NAME}: seq_end must be int32, got float32"),
    Bad("k_over", wrong(k=17), f"{NAME}: k must be in [0, seq_len] ([0, 16]), got 17"),
    Bad("k_negative", wrong(k=-1), f"{NAME}: k must be in [0, seq_len] ([0, 16]), got -1"),
    Bad("sink_negative", wrong(sink=-2), f"{NAME}: sink must be at least 0, got -2"),
    Bad("window_negative", wrong(window=-1), f"{NAME}: window must be at least 0, got -1"),
    Bad("forced_over", wrong(sink=3, window=6), f"{NAME}: window must be at most k - sink (5), got 6"),
    Bad("sink_over", wrong(sink=9, window=0), f"{NAME}: window must be at most k - sink (-1), got 0"),
    Bad("count_value", wrong(counts=ints(3, -1)), f"{NAME}: counts must be at least 0, got -1 at [1]", reads_data=True),
    Bad(
        "start_value",
        wrong(seq_start=ints(17, 0)),
        f"{NAME}: seq_start must be in [0, seq_len], got 17 at [0]",
        reads_data=True,
    ),
    Bad(
        "end_value",
        wrong(seq_end=ints(16, 20)),
        f"{NAME}: seq_end must be in [0, seq_len], got 20 at [1]",
        reads_data=True,
    ),
]
