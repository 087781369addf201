"""window_scores against float64, and its promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import score as reference

INF = float("inf")
REDUCES = list(
    itertools.product(["sum", "mean", "max"], ["none", "mean", "max", "sum"], ["none", "avg", "max"], [False, True])
)


def make(batch, num_q_heads, num_kv_heads, window, seq_len, head_dim, dtype=torch.float32, device="cpu", peak=3.0):
    """Queries and keys with a few heavy keys, so that softmax is neither flat nor one-hot."""
    q = torch.randn(batch, num_q_heads, window, head_dim, device=device)
    k = torch.randn(batch, num_kv_heads, seq_len, head_dim, device=device)
    k[:, :, :: max(seq_len // 5, 1)] *= peak
    return q.to(dtype), k.to(dtype)


def assert_close(out, q, k, **options):
    """Infinities where the reference has them; else twice the error of plain float32 torch, and the rounding of a dot.

    A running sum of products is rounded once a step, each time by up to eps / 2 of what it holds. As a random walk these
    roundings reach about eps / 2 * sum |q_d k_d|; the logit and the log-sum-exp bring one each to the exponent.
    """
    q, k = q.cpu(), k.cpu()
    options = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    expected = reference.window_scores(q, k, **options)
    plain = reference.window_scores(q, k, **options, dtype=torch.float32)
    out = out.cpu()
    assert out.dtype == torch.float32
    assert out.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(out[~finite], expected[~finite].float())
    if finite.any():
        error = (out.double() - expected)[finite].abs().max()
        plain_error = (plain.double() - expected)[finite].abs().max()
        walk = reference.logits(q.abs(), k.abs(), options.get("softmax_scale")).max()
        rounding = torch.finfo(torch.float32).eps * expected[finite].abs().max() * (4 + walk)
        assert error <= 2 * plain_error + rounding, f"{error:.3g} against {plain_error:.3g} + {rounding:.3g}"


def check(q, k, **options):
    assert_close(kvcompress.window_scores(q, k, **options), q, k, **options)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 136, 192, 256])
@pytest.mark.parametrize("q_per_kv", [1, 4, 8])
@pytest.mark.parametrize("window", [1, 5, 32, 64])
def test_against_float64(dtype, head_dim, q_per_kv, window, device):
    q, k = make(2, 2 * q_per_kv, 2, window, 333, head_dim, dtype, device)
    check(q, k, pool="max", kernel_size=7, window_reduce="mean")
    check(q, k, seq_start=cases.left_padding(2, 333, device), lse=None, pool="avg", kernel_size=5, group_reduce="max")


@pytest.mark.parametrize(("window_reduce", "group_reduce", "pool", "pool_first"), REDUCES)
def test_reductions(window_reduce, group_reduce, pool, pool_first, device):
    q, k = make(3, 8, 2, 13, 150, 32, torch.bfloat16, device)
    options = {
        "window_reduce": window_reduce,
        "group_reduce": group_reduce,
        "pool": pool,
        "pool_first": pool_first,
        "kernel_size": 5,
    }
    check(q, k, **options)
    start = cases.left_padding(3, 150, device)
    check(q, k, seq_start=start, weights=torch.rand(3, 2, 150, device=device), num_scored=140, **options)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("seq_len", [1, 63, 64, 300, 700])
@pytest.mark.parametrize("padded", [False, True])
def test_column_sums_of_full_attention(dtype, seq_len, padded, device):
    q, k = make(2, 4, 2, seq_len, seq_len, 64, dtype, device)
    start = cases.left_padding(2, seq_len, device) if padded else None
    options = {"seq_start": start, "first_query": 0, "num_scored": seq_len}
    check(q, k, **options)
    check(q, k, window_reduce="max", group_reduce="none", **options)
    if not padded:  # every row of P adds up to 1
        total = kvcompress.window_scores(q, k, group_reduce="sum", **options).sum(-1)
        assert torch.allclose(total, torch.full_like(total, 2.0 * seq_len), rtol=1e-5)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("window", [1, 24, 200])
def test_given_log_sum_exp(dtype, window, device):
    q, k = make(2, 8, 2, window, 200, 64, dtype, device)
    start = cases.left_padding(2, 200, device)
    for seq_start in (None, start):
        lse = reference.log_sum_exp(q, k, seq_start)
        padded = torch.full((2, 8, window + 3), float("nan"), device=device)
        padded[..., 3:] = lse.nan_to_num(neginf=0.0)
        check(q, k, lse=padded[..., 3:], seq_start=seq_start, num_scored=200, pool="avg", kernel_size=3)


@pytest.mark.parametrize(("first_query", "window"), [(0, 8), (40, 8), (95, 8), (100, 8), (500, 3)])
def test_query_positions(first_query, window, device):
    """In the past, across the end and from beyond it, where every key is seen."""
    q, k = make(2, 4, 2, window, 100, 64, torch.float16, device)
    check(q, k, first_query=first_query, pool="max", kernel_size=3)
    check(
        q,
        k,
        first_query=first_query,
        num_scored=100,
        seq_start=cases.left_padding(2, 100, device),
        window_reduce="mean",
    )


def test_padded_row_is_that_row_alone(device):
    q, k = make(3, 4, 2, 16, 130, 64, torch.bfloat16, device)
    start = torch.tensor([0, 37, 120], dtype=torch.int32, device=device)
    options = {"pool": "avg", "kernel_size": 7, "window_reduce": "mean", "num_scored": 130}
    together = kvcompress.window_scores(q, k, seq_start=start, **options)
    for b, first in enumerate(start.tolist()):
        window = min(16, 130 - first)
        alone = kvcompress.window_scores(
            q[b : b + 1, :, 16 - window :], k[b : b + 1, :, first:], **{**options, "num_scored": 130 - first}
        )
        assert torch.equal(together[b, :, :first], torch.full((2, first), -INF, device=device))
        assert torch.allclose(together[b, :, first:], alone[0], rtol=1e-5, atol=1e-7)


def test_fully_padded_row(device):
    q, k = make(2, 4, 2, 8, 40, 16, device=device)
    for first in (32, 39, 40):
        start = torch.tensor([first, 0], dtype=torch.int32, device=device)
        check(q, k, seq_start=start, num_scored=40, window_reduce="mean")
        check(q, k, seq_start=start)


def test_fills(device):
    q, k = make(1, 4, 4, 8, 40, 16, device=device)
    out = kvcompress.window_scores(q, k, seq_start=torch.tensor([5], dtype=torch.int32, device=device))
    assert (out[..., :5] == -INF).all()
    assert out[..., 5:32].isfinite().all()
    assert (out[..., 32:] == INF).all()


def unaligned(k):
    """The same keys where no load of 16 bytes, and so neither TMA nor wgmma, can reach them."""
    odd = torch.empty(*k.shape[:-1], k.shape[-1] + 3, dtype=k.dtype, device=k.device)[..., 1 : k.shape[-1] + 1]
    return odd.copy_(k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "window", "seq_len", "head_dim"),
    [
        (8, 2, 64, 333, 128),  # 256 rows: a row group
        (8, 2, 32, 1000, 128),  # 128 rows
        (8, 8, 8, 700, 128),  # 8 rows
        (6, 2, 33, 555, 96),  # an odd window, padded to 40
        (16, 1, 64, 450, 64),  # 1024 rows: four groups
        (10, 2, 100, 300, 80),  # groups of 2, 2 and 1 heads
        (4, 2, 256, 600, 128),
        (3, 1, 130, 131, 112),
        (32, 2, 8, 129, 72),
        (4, 4, 1, 65, 40),
        (8, 2, 32, 1000, 192),  # 128 rows: a row group of wide heads
        (12, 1, 33, 450, 256),  # groups of three heads of 40 rows
        (4, 2, 128, 600, 136),
        (3, 1, 130, 131, 160),  # wider than a row group of wide heads
    ],
)
def test_paths_agree(dtype, num_q_heads, num_kv_heads, window, seq_len, head_dim, device):
    """Aligned and unaligned keys, which take different kernels on Hopper: each against float64, in every reduction."""
    q, k = make(2, num_q_heads, num_kv_heads, window, seq_len, head_dim, dtype, device)
    start = torch.tensor([0, seq_len // 3], dtype=torch.int32, device=device)
    weights = torch.rand(2, num_kv_heads, seq_len, device=device)
    lse = reference.log_sum_exp(q, k, start).nan_to_num(neginf=0.0)
    for keys in (k, cases.strided(k), unaligned(k)):
        check(q, keys, pool="avg", kernel_size=5)
        check(q, keys, seq_start=start, weights=weights, group_reduce="max", pool="max", kernel_size=7)
        check(q, keys, seq_start=start, lse=lse, num_scored=seq_len, group_reduce="sum", window_reduce="mean")
        check(q, keys, seq_start=start, group_reduce="none", pool="max", kernel_size=3)
        check(q, keys, pool_first=True, pool="max", kernel_size=3, first_query=seq_len // 2, num_scored=seq_len)
        check(q, keys, window_reduce="max")


@pytest.mark.parametrize("seq_len", [45, 1100, 5000])
@pytest.mark.parametrize("kernel_size", [1, 5, 65, 67, 301])
@pytest.mark.parametrize("batch", [1, 3])
def test_pool_across_blocks(seq_len, kernel_size, batch, device):
    """Scores near the border of two blocks, and rows with fewer keys than a pool, a tile or the blocks of a row take."""
    q, k = make(batch, 8, 2, 16, seq_len, 64, torch.bfloat16, device)
    lse = reference.log_sum_exp(q, k)
    starts = [0, seq_len // 3 + 1, seq_len - 17, seq_len - 20, seq_len - 40]
    for first in starts[: 5 if batch == 1 else 3]:
        start = torch.tensor([first, 0, starts[1]][:batch], dtype=torch.int32, device=device)
        check(q, k, seq_start=start, pool="avg", kernel_size=kernel_size)
        check(q, k, seq_start=start, pool="max", kernel_size=kernel_size, group_reduce="none", num_scored=seq_len)
    check(q, k, lse=lse, pool="avg", kernel_size=kernel_size, num_scored=seq_len * 2 // 3)
    flat = kvcompress.window_scores(q, k[:, :, :1].expand_as(k), pool="max", kernel_size=kernel_size)[
        ..., : seq_len - 16
    ]
    assert torch.equal(flat, flat[..., :1].expand_as(flat))


@pytest.mark.parametrize("head_dim", [64, 128, 160, 256])
def test_many_tiles(head_dim, device):
    """Blocks that go round their ring of keys more than once."""
    q, k = make(1, 32, 16, 64, 5000, head_dim, torch.bfloat16, device)
    check(q, k, pool="avg", kernel_size=5)
    start = torch.tensor([777], dtype=torch.int32, device=device)
    check(q, k, lse=reference.log_sum_exp(q, k, start), seq_start=start, group_reduce="none", num_scored=5000)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_logits_that_grow(head_dim, device):
    """Each stretch of keys outweighs all before it: a running reference has to move, and 2^64 apart in one step."""
    q, k = make(1, 4, 1, 64, 3000, head_dim, torch.bfloat16, device)
    q, k = q.abs(), k.abs()
    k *= torch.linspace(0, 4, 3000, device=device)[:, None].to(k.dtype)
    check(q, k, num_scored=3000)
    k[:, :, 1500] *= 30
    check(q, k, num_scored=3000)
    check(q, unaligned(k), num_scored=3000)
    check(q, -k, num_scored=3000)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 80, 128, 200])
def test_strided_views(dtype, head_dim, device):
    q, k = make(2, 8, 2, 20, 170, head_dim, dtype, device)
    expected = kvcompress.window_scores(q, k, pool="avg", kernel_size=5)
    views = [cases.strided(q), cases.strided(k)]
    assert torch.equal(kvcompress.window_scores(*views, pool="avg", kernel_size=5), expected)
    bshd = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kvcompress.window_scores(q, bshd, pool="avg", kernel_size=5), expected)
    # without 16-byte steps other kernels may run
    check(q, unaligned(k), pool="avg", kernel_size=5)
    assert torch.equal(*(kvcompress.window_scores(q, unaligned(x), pool="avg", kernel_size=5) for x in (k, views[1])))


def test_large_logits(device):
    """Far beyond what exp takes; the sink outweighs the rest by hundreds of powers of two."""
    q, k = make(1, 4, 1, 16, 400, 64, torch.float32, device, peak=60.0)
    check(q, k, num_scored=400)
    check(q, k, softmax_scale=4.0)
    k = -k.abs()
    k[:, :, 7] = 0
    check(q.abs(), k, softmax_scale=30.0)


def test_ties(device):
    """Equal keys have equal scores, to the bit."""
    q = torch.randn(1, 8, 4, 64, device=device)
    k = torch.randn(1, 2, 1, 64, device=device).expand(1, 2, 500, 64)
    out = kvcompress.window_scores(q, k)[..., :496]
    assert torch.equal(out, out[..., :1].expand_as(out))


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_ties_far_apart(dtype, device):
    """Equal keys in different blocks, the heaviest keys behind all of them: still equal to the bit."""
    q, k = make(1, 8, 2, 16, 1100, 64, dtype, device)
    twins = torch.arange(3, 1000, 97, device=device)
    k[:, :, twins] = k[:, :, 3:4]
    k[:, :, 1001] = 4 * q[:, ::4, 5]
    out = kvcompress.window_scores(q, k)[..., twins]
    assert torch.equal(out, out[..., :1].expand_as(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_window(dtype, device):
    """More exponentials than a CPU worker keeps: products are computed twice instead."""
    q, k = make(1, 2, 1, 2100, 4200, 16, dtype, device)
    check(q, k, pool="avg", kernel_size=5)


@pytest.mark.parametrize("group_reduce", ["none", "mean", "max", "sum"])
@pytest.mark.parametrize("window_reduce", ["mean", "max"])
def test_tall_group(group_reduce, window_reduce, device):
    """Query heads of one kv head in several tiles, each with blocks of its own."""
    q, k = make(1, 7, 1, 70, 900, 32, torch.bfloat16, device)
    options = {
        "group_reduce": group_reduce,
        "window_reduce": window_reduce,
        "weights": torch.rand(1, 1, 900, device=device),
    }
    check(q, k, pool="max", kernel_size=3, **options)
    check(q, k, pool="avg", kernel_size=3, pool_first=True, num_scored=890, **options)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(
    "options", [{}, {"window_reduce": "max"}, {"group_reduce": "max"}, {"pool": "max", "kernel_size": 3}]
)
def test_nan_does_not_vanish(dtype, options, device):
    q, k = make(1, 4, 2, 8, 300, 64, dtype, device)
    lse = reference.log_sum_exp(q, k)
    k[0, 1, 100, 3] = float("nan")
    out = kvcompress.window_scores(q, k, **options)
    assert out[0, 1, :292].isnan().all()  # softmax: the rows are lost
    assert out[0, 0, :292].isfinite().all()
    out = kvcompress.window_scores(q, k, lse=lse, **options)
    spread = options.get("kernel_size", 1) // 2
    assert out[0, 1].isnan().nonzero().flatten().tolist() == list(range(100 - spread, 101 + spread))


def test_nan_behind_the_query_is_not_seen(device):
    q, k = make(1, 2, 1, 4, 90, 16, device=device)
    expected = kvcompress.window_scores(q, k, first_query=50)
    k[:, :, 54:] = float("nan")
    start = torch.tensor([0], dtype=torch.int32, device=device)
    assert torch.equal(kvcompress.window_scores(q, k, first_query=50, seq_start=start), expected)


@pytest.mark.parametrize("head_dim", [128, 192])
def test_bitwise_run_to_run(head_dim, device):
    q, k = make(2, 16, 4, 64, 3000, head_dim, torch.bfloat16, device)
    first = kvcompress.window_scores(q, k, pool="avg", kernel_size=5)
    assert all(torch.equal(kvcompress.window_scores(q, k, pool="avg", kernel_size=5), first) for _ in range(5))


def test_thread_count_changes_nothing():
    q, k = make(1, 4, 2, 40, 1500, 64)
    expected = kvcompress.window_scores(q, k)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(kvcompress.window_scores(q, k), expected)
    finally:
        torch.set_num_threads(threads)


def test_empty(device):
    q, k = make(0, 4, 2, 4, 10, 16, device=device)
    assert kvcompress.window_scores(q, k).shape == (0, 2, 10)
    q, k = make(2, 4, 2, 4, 1, 16, device=device)
    assert kvcompress.window_scores(q, k[:, :, :0], first_query=0).shape == (2, 2, 0)
    assert (kvcompress.window_scores(q, k, first_query=0) == INF).all()  # nothing is scored
    assert (kvcompress.window_scores(q, k, first_query=5, group_reduce="sum", window_reduce="sum") == 8).all()


def test_compiled(device):
    """fullgraph, and shapes that move."""
    compiled = torch.compile(
        lambda q, k: kvcompress.window_scores(q, k, pool="max", kernel_size=7) * 2,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for seq_len in (50, 60):
        q, k = make(1, 4, 2, 8, seq_len, 16, device=device)
        assert torch.equal(compiled(q, k), kvcompress.window_scores(q, k, pool="max", kernel_size=7) * 2)


@pytest.mark.parametrize(("argument", "value"), [("window_reduce", "median"), ("group_reduce", "min"), ("pool", "sum")])
def test_unknown_names(argument, value):
    q, k = make(1, 2, 1, 2, 8, 8)
    with pytest.raises(ValueError, match=rf'window_scores: {argument} must be "\w+", .* or "\w+", got \'{value}\''):
        kvcompress.window_scores(q, k, **{argument: value})


def test_errors_of_the_function():
    q, k = make(1, 2, 1, 9, 8, 8)
    with pytest.raises(ValueError, match="window_scores: first_query must be at least 0, got -1"):
        kvcompress.window_scores(q, k)
    with pytest.raises(TypeError, match=r"window_scores: k must be of the dtype of q \(float32\), got float16"):
        kvcompress.window_scores(q, k.half())


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_fuzz(data):
    draw = data.draw
    batch, num_kv_heads, q_per_kv = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seq_len, head_dim = draw(st.integers(1, 300)), 8 * draw(st.integers(1, 10))
    first_query, window = draw(st.integers(0, seq_len + 5)), draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 9999)))
    q, k = make(
        batch, num_kv_heads * q_per_kv, num_kv_heads, window, seq_len, head_dim, draw(st.sampled_from(cases.FLOATS))
    )
    start = torch.randint(0, seq_len + 1, (batch,), dtype=torch.int32) if draw(st.booleans()) else None
    window_reduce, group_reduce, pool, pool_first = draw(st.sampled_from(REDUCES))
    check(
        q,
        k,
        seq_start=start,
        first_query=first_query,
        num_scored=draw(st.integers(0, seq_len)),
        window_reduce=window_reduce,
        group_reduce=group_reduce,
        pool=pool,
        pool_first=pool_first,
        kernel_size=draw(st.sampled_from([1, 3, 9])),
    )


def samples(device):
    q, k = make(2, 4, 2, 6, 50, 16, torch.bfloat16, device)
    lse, weights = torch.full((2, 4, 6), 5.0, device=device), torch.rand(2, 2, 50, device=device)
    start = cases.left_padding(2, 50, device)
    return [
        (q, k, None, None, None, 44, 44, 7, 0, 1, 2, 0.25, False),
        (q.float(), k.float(), lse, weights, start, 60, 50, 5, 2, 0, 1, 0.25, True),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "q": torch.randn(2, 8, 4, 16, device=device),
            "k": torch.randn(2, 2, 20, 16, device=device),
            "lse": torch.zeros(2, 8, 4, device=device),
            "weights": torch.ones(2, 2, 20, device=device),
            "seq_start": torch.zeros(2, dtype=torch.int32, device=device),
            "first_query": 16,
            "num_scored": 16,
            "kernel_size": 5,
            "window_reduce": 0,
            "group_reduce": 1,
            "pool": 2,
            "softmax_scale": 0.25,
            "pool_first": False,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def full(*shape, dtype=torch.float32):
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


NAME = "window_scores"
BAD = [
    Bad(
        "rank_q",
        wrong(q=full(8, 4, 16)),
        f"{NAME}: q must be [batch, num_q_heads, window, head_dim], got 3D [8, 4, 16]",
    ),
    Bad(
        "rank_k", wrong(k=full(20, 16)), f"{NAME}: k must be [batch, num_kv_heads, seq_len, head_dim], got 2D [20, 16]"
    ),
    Bad(
        "dtype",
        wrong(q=full(2, 8, 4, 16, dtype=torch.float64)),
        f"{NAME}: q must be float32, float16 or bfloat16, got float64",
    ),
    Bad(
        "mixed",
        wrong(k=full(2, 2, 20, 16, dtype=torch.float16)),
        f"{NAME}: k must be of the dtype of q (float32), got float16",
    ),
    Bad("batch", wrong(k=full(3, 2, 20, 16)), f"{NAME}: k must be of the batch of q (2), got 3"),
    Bad("head_dims", wrong(k=full(2, 2, 20, 24)), f"{NAME}: k must be of the head_dim of q (16), got 24"),
    Bad(
        "head_dim",
        wrong(q=full(2, 8, 4, 20), k=full(2, 2, 20, 20)),
        f"{NAME}: head_dim must be a multiple of 8 from 8 to 256, got 20",
    ),
    Bad(
        "head_dim_large",
        wrong(q=full(2, 8, 4, 264), k=full(2, 2, 20, 264)),
        f"{NAME}: head_dim must be a multiple of 8 from 8 to 256, got 264",
    ),
    Bad("no_kv_heads", wrong(k=full(2, 0, 20, 16)), f"{NAME}: num_kv_heads must be at least 1, got 0"),
    Bad("heads", wrong(k=full(2, 3, 20, 16)), f"{NAME}: num_q_heads must be a multiple of num_kv_heads (3), got 8"),
    Bad("no_q_heads", wrong(q=full(2, 0, 4, 16)), f"{NAME}: num_q_heads must be a multiple of num_kv_heads (2), got 0"),
    Bad("window", wrong(q=full(2, 8, 0, 16)), f"{NAME}: window must be at least 1, got 0"),
    Bad(
        "stride_q",
        wrong(q=lambda d: torch.ones(2, 8, 16, 4, device=d).mT),
        f"{NAME}: q must be contiguous in the last dimension, got a last stride of 4",
    ),
    Bad(
        "stride_k",
        wrong(k=lambda d: torch.ones(2, 2, 16, 20, device=d).mT),
        f"{NAME}: k must be contiguous in the last dimension, got a last stride of 20",
    ),
    Bad(
        "lse", wrong(lse=full(2, 8, 5)), f"{NAME}: lse must be [batch, num_q_heads, window] [2, 8, 4], got 3D [2, 8, 5]"
    ),
    Bad("lse_dtype", wrong(lse=full(2, 8, 4, dtype=torch.bfloat16)), f"{NAME}: lse must be float32, got bfloat16"),
    Bad(
        "weights",
        wrong(weights=full(2, 8, 20)),
        f"{NAME}: weights must be [batch, num_kv_heads, seq_len] [2, 2, 20], got 3D [2, 8, 20]",
    ),
    Bad(
        "weights_rank",
        wrong(weights=full(2, 20)),
        f"{NAME}: weights must be [batch, num_kv_heads, seq_len] [2, 2, 20], got 2D [2, 20]",
    ),
    Bad(
        "weights_stride",
        wrong(weights=lambda d: torch.ones(2, 20, 2, device=d).mT),
        f"{NAME}: weights must be contiguous in the last dimension, got a last stride of 2",
    ),
    Bad("seq_start", wrong(seq_start=full(3, dtype=torch.int32)), f"{NAME}: seq_start must be [batch] (2), got 1D [3]"),
    Bad("seq_start_dtype", wrong(seq_start=full(2, dtype=torch.int64)), f"{NAME}: seq_start must be int32, got int64"),
    Bad("first_query", wrong(first_query=-1), f"{NAME}: first_query must be at least 0, got -1"),
    Bad("num_scored", wrong(num_scored=21), f"{NAME}: num_scored must be from 0 to seq_len (20), got 21"),
    Bad("num_scored_negative", wrong(num_scored=-1), f"{NAME}: num_scored must be from 0 to seq_len (20), got -1"),
    Bad("even_kernel", wrong(kernel_size=4), f"{NAME}: kernel_size must be odd and at least 1, got 4"),
    Bad("negative_kernel", wrong(kernel_size=-1), f"{NAME}: kernel_size must be odd and at least 1, got -1"),
    Bad("window_code", wrong(window_reduce=3), f"{NAME}: window_reduce must be 0 (sum), 1 (mean) or 2 (max), got 3"),
    Bad(
        "group_code",
        wrong(group_reduce=-1),
        f"{NAME}: group_reduce must be 0 (none), 1 (mean), 2 (max) or 3 (sum), got -1",
    ),
    Bad("pool_code", wrong(pool=9), f"{NAME}: pool must be 0 (none), 1 (avg) or 2 (max), got 9"),
    Bad("scale", wrong(softmax_scale=0.0), f"{NAME}: softmax_scale must be finite and above 0, got 0.000000"),
    Bad("scale_inf", wrong(softmax_scale=INF), f"{NAME}: softmax_scale must be finite and above 0, got inf"),
    Bad("scale_nan", wrong(softmax_scale=float("nan")), f"{NAME}: softmax_scale must be finite and above 0, got nan"),
]
