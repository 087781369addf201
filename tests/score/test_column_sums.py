"""column_sums against float64, and its promises."""

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
from tests.score.test_window_scores import make

INF = float("inf")
PLAIN = ["sum", "mean", "sum_squares", "max"]
CHANGES = ["key_change", "joint_change", "cross_change"]
GROUPS = ["none", "mean", "max", "sum"]


def outputs(q, k):
    """v, and an attention output in q's dtype: what the op is given is what the reference gets."""
    return {"v": torch.randn_like(k) * 2, "output": torch.randn_like(q)}


def assert_close(out, q, k, **options):
    """Infinities where the reference has them; else twice the error of plain float32 torch, and the rounding of a dot.

    The bound of a logit's rounding is that of `test_window_scores`. A change of the output squares P and s, and takes
    differences of squares of v and o: their rounding counts against the sum of the terms' sizes.
    """
    q, k = q.cpu(), k.cpu()
    options = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    expected = reference.column_sums(q, k, **options)
    plain = reference.column_sums(q, k, **options, dtype=torch.float32)
    out = out.cpu()
    assert out.dtype == torch.float32
    assert out.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(out[~finite], expected[~finite].float())
    if finite.any():
        error = (out.double() - expected)[finite].abs().max()
        plain_error = (plain.double() - expected)[finite].abs().max()
        walk = reference.logits(q.abs(), k.abs(), options.get("softmax_scale")).max()
        size, roundings = expected[finite].abs().max(), 4 + walk
        if options.get("statistic") in CHANGES:
            size, roundings = size + terms(q, k, **options), 2 * roundings
        rounding = torch.finfo(torch.float32).eps * size * roundings
        assert error <= 2 * plain_error + rounding, f"{error:.3g} against {plain_error:.3g} + {rounding:.3g}"


def terms(q, k, *, v, output, statistic, **options):
    """The largest column of the change's terms, all taken positive: what its rounding is relative to."""
    scale = options.pop("softmax_scale", None)
    largest = reference.logits(q.abs(), k.abs(), scale).max()
    squares = reference.column_sums(q, k, **options, statistic="sum_squares", softmax_scale=scale)
    lengths = v.double().norm(dim=-1).max() + output.double().norm(dim=-1).max()
    return squares[squares.isfinite()].max() * (1 + largest) ** 2 * lengths**2


def check(q, k, **options):
    assert_close(kvcompress.column_sums(q, k, **options), q, k, **options)


def ascending(batch, window, high, device, low=0):
    return torch.randint(low, high, (batch, window)).sort(-1).values.int().to(device)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("statistic", ["sum", "max", "joint_change"])
def test_against_float64(dtype, head_dim, statistic, device):
    q, k = make(2, 4, 2, 300, 300, head_dim, dtype, device)
    options = {"statistic": statistic, **(outputs(q, k) if statistic in CHANGES else {})}
    check(q, k, **options)
    check(q, k, seq_start=cases.left_padding(2, 300, device), group_reduce="max", **options)


@pytest.mark.parametrize("q_per_kv", [1, 3, 8])
@pytest.mark.parametrize("statistic", ["sum", "key_change"])
def test_groups(q_per_kv, statistic, device):
    q, k = make(1, 2 * q_per_kv, 2, 200, 200, 64, torch.float16, device)
    check(q, k, statistic=statistic, **(outputs(q, k) if statistic in CHANGES else {}))


@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 127, 128, 129, 255, 257, 511, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
def test_lengths(seq_len, dtype, padded, device):
    """Around the edges of tiles; every row of the map adds up to 1."""
    q, k = make(2, 4, 2, seq_len, seq_len, 64, dtype, device)
    start = cases.left_padding(2, seq_len, device) if padded else None
    check(q, k, seq_start=start)
    check(q, k, seq_start=start, statistic="max", group_reduce="none")
    if not padded:
        total = kvcompress.column_sums(q, k, group_reduce="sum").sum(-1)
        assert torch.allclose(total, torch.full_like(total, 2.0 * seq_len), rtol=1e-5)


@pytest.mark.parametrize(("statistic", "group_reduce"), list(itertools.product([*PLAIN, *CHANGES], GROUPS)))
def test_reductions(statistic, group_reduce, device):
    """Weights, positions with repeats and rows that are none, padding, all at once."""
    q, k = make(3, 8, 2, 45, 150, 32, torch.bfloat16, device)
    options = {"statistic": statistic, "group_reduce": group_reduce}
    if statistic in CHANGES:
        options.update(outputs(q, k))
    check(q, k, **options)
    positions = ascending(3, 45, 160, device, low=-1)
    weights = torch.rand(3, 8, 45, device=device)
    start = cases.left_padding(3, 150, device)
    check(q, k, query_positions=positions, query_weights=weights, seq_start=start, **options)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("window", [1, 24, 200])
def test_given_log_sum_exp(dtype, window, device):
    q, k = make(2, 8, 2, window, 200, 64, dtype, device)
    for seq_start in (None, cases.left_padding(2, 200, device)):
        lse = reference.log_sum_exp(q, k, seq_start)
        wide = torch.full((2, 8, window + 3), float("nan"), device=device)
        wide[..., 3:] = lse.nan_to_num(neginf=0.0)
        check(q, k, lse=wide[..., 3:], seq_start=seq_start)
        check(q, k, lse=wide[..., 3:], seq_start=seq_start, statistic="joint_change", **outputs(q, k))


@pytest.mark.parametrize("statistic", PLAIN)
def test_scattered_rows_are_those_rows_of_the_prompt(statistic, device):
    """ZipCache's probes: queries picked from the prompt, each at its own position, one of them twice."""
    q, k = make(1, 4, 2, 400, 400, 64, torch.bfloat16, device)
    rows = torch.tensor([3, 40, 40, 111, 298, 399], device=device)
    picked = kvcompress.column_sums(
        q[:, :, rows], k, statistic=statistic, group_reduce="none", query_positions=rows[None].int()
    )
    probabilities = (
        reference.logits(q.cpu(), k.cpu()).masked_fill(torch.ones(400, 400).triu(1).bool(), -INF).softmax(-1)
    )
    chosen, seen = probabilities[:, :, rows.cpu()], (rows.cpu()[:, None] >= torch.arange(400)).sum(0)
    expected = {
        "sum": chosen.sum(2),
        "mean": chosen.sum(2) / seen.clamp_min(1),
        "sum_squares": chosen.square().sum(2),
        "max": chosen.amax(2),
    }[statistic]
    assert torch.allclose(picked.cpu().double(), expected, rtol=1e-4, atol=1e-6)


def test_one_row_at_the_end_is_window_scores(device):
    q, k = make(2, 8, 2, 1, 333, 64, torch.float16, device)
    ours = kvcompress.column_sums(q, k)
    assert torch.allclose(ours, kvcompress.window_scores(q, k, num_scored=333), rtol=1e-5, atol=1e-8)


def test_queries_from_beyond_the_prompt_see_every_key(device):
    q, k = make(2, 4, 2, 30, 100, 64, torch.float16, device)
    check(q, k, first_query=100)
    check(q, k, first_query=90, statistic="mean")
    check(q, k, query_positions=torch.full((2, 30), 2**31 - 2, dtype=torch.int32, device=device))


def test_padded_row_is_that_row_alone(device):
    q, k = make(3, 4, 2, 130, 130, 64, torch.bfloat16, device)
    start = torch.tensor([0, 37, 129], dtype=torch.int32, device=device)
    for statistic in PLAIN:
        together = kvcompress.column_sums(q, k, seq_start=start, statistic=statistic)
        for b, first in enumerate(start.tolist()):
            alone = kvcompress.column_sums(q[b : b + 1, :, first:], k[b : b + 1, :, first:], statistic=statistic)
            assert torch.equal(together[b, :, :first], torch.full((2, first), -INF, device=device))
            assert torch.allclose(together[b, :, first:], alone[0], rtol=1e-5, atol=1e-7)


def test_fully_padded_row(device):
    q, k = make(2, 4, 2, 40, 40, 16, device=device)
    start = torch.tensor([40, 0], dtype=torch.int32, device=device)
    for statistic in PLAIN:
        check(q, k, seq_start=start, statistic=statistic)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 80, 128])
@pytest.mark.parametrize("statistic", ["sum", "joint_change"])
def test_strided_views(dtype, head_dim, statistic, device):
    q, k = make(2, 8, 2, 170, 170, head_dim, dtype, device)
    extra = outputs(q, k) if statistic in CHANGES else {}
    expected = kvcompress.column_sums(q, k, statistic=statistic, **extra)
    views = [cases.strided(q), cases.strided(k)]
    wide = {name: cases.strided(x) for name, x in extra.items()}
    assert torch.equal(kvcompress.column_sums(*views, statistic=statistic, **wide), expected)
    bshd = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kvcompress.column_sums(q, bshd, statistic=statistic, **extra), expected)
    odd = torch.empty(2, 2, 170, head_dim + 3, dtype=dtype, device=device)[..., 1 : head_dim + 1]  # no 16-byte loads
    odd.copy_(k)
    assert torch.equal(kvcompress.column_sums(q, odd, statistic=statistic, **extra), expected)


def test_large_logits(device):
    """Far beyond what exp takes; the sink outweighs the rest by hundreds of powers of two."""
    q, k = make(1, 4, 1, 200, 200, 64, torch.float32, device, peak=60.0)
    check(q, k)
    check(q, k, softmax_scale=4.0, statistic="max")


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_logits_far_below_zero(dtype, head_dim, device):
    """The first rows see few keys, so their largest logit may lie where exp2 of it is 0; in any place of a tile."""
    q, k = make(1, 4, 1, 200, 200, head_dim, dtype, device)
    check(q, k, softmax_scale=30.0)
    out = kvcompress.column_sums(q, k, softmax_scale=30.0, statistic="max", group_reduce="none")
    assert (out[:, :, 0] == 1).all()  # row 0 sees key 0 alone
    assert torch.allclose(
        kvcompress.window_scores(q, k, softmax_scale=30.0, first_query=0, num_scored=200),
        kvcompress.column_sums(q, k, softmax_scale=30.0),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("statistic", PLAIN)
def test_nan_does_not_vanish(dtype, statistic, device):
    q, k = make(1, 4, 2, 300, 300, 64, dtype, device)
    lse = reference.log_sum_exp(q, k)
    k[0, 1, 100, 3] = float("nan")
    out = kvcompress.column_sums(q, k, statistic=statistic)
    assert out[0, 1].isnan().all()  # softmax: the rows from 100 on are lost, and every key is seen by one of them
    assert out[0, 0].isfinite().all()
    out = kvcompress.column_sums(q, k, lse=lse, statistic=statistic)
    assert out[0, 1].isnan().nonzero().flatten().tolist() == [100]


def test_nan_behind_the_query_is_not_seen(device):
    q, k = make(1, 2, 1, 40, 90, 16, device=device)
    expected = kvcompress.column_sums(q, k, first_query=10)
    k[:, :, 50:] = float("nan")
    assert torch.equal(kvcompress.column_sums(q, k, first_query=10)[..., :50], expected[..., :50])


def test_bitwise_run_to_run(device):
    q, k = make(2, 16, 4, 1000, 1000, 128, torch.bfloat16, device)
    first = kvcompress.column_sums(q, k)
    assert all(torch.equal(kvcompress.column_sums(q, k), first) for _ in range(3))


def test_thread_count_changes_nothing():
    q, k = make(1, 4, 2, 700, 700, 64)
    expected = kvcompress.column_sums(q, k)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(kvcompress.column_sums(q, k), expected)
    finally:
        torch.set_num_threads(threads)


def test_nothing_of_the_size_of_the_map_is_held(device):
    """Scratch as documented, far below a map of 2048 x 2048 (on the GPU, where the allocator counts)."""
    q, k = make(1, 8, 2, 2048, 2048, 64, torch.bfloat16, device)
    if q.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = kvcompress.column_sums(q, k, statistic="joint_change", **outputs(q, k))
        held = torch.cuda.max_memory_allocated() - before - 2 * (q.nbytes + k.nbytes)  # randn_like, twice
        assert held < out.nbytes + 4 * 8 * 2048 * 4 + 2**21 + 2**16
    else:
        with torch.profiler.profile(profile_memory=True) as profile:
            kvcompress.column_sums(q, k)
        largest = max((event.self_cpu_memory_usage for event in profile.key_averages()), default=0)
        assert 0 < largest < 2**22 < 2048 * 2048 * 2


def test_empty(device):
    q, k = make(0, 4, 2, 4, 10, 16, device=device)
    assert kvcompress.column_sums(q, k).shape == (0, 2, 10)
    q, k = make(2, 4, 2, 4, 1, 16, device=device)
    assert kvcompress.column_sums(q, k[:, :, :0], first_query=0).shape == (2, 2, 0)
    assert (kvcompress.column_sums(q, k, first_query=5, group_reduce="sum") == 8).all()


def test_compiled(device):
    """fullgraph, and shapes that move."""
    compiled = torch.compile(
        lambda q, k: kvcompress.column_sums(q, k, statistic="max") * 2,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for seq_len in (50, 60):
        q, k = make(1, 4, 2, seq_len, seq_len, 16, device=device)
        assert torch.equal(compiled(q, k), kvcompress.column_sums(q, k, statistic="max") * 2)


@pytest.mark.parametrize(("argument", "value"), [("statistic", "median"), ("group_reduce", "min")])
def test_unknown_names(argument, value):
    q, k = make(1, 2, 1, 8, 8, 8)
    with pytest.raises(ValueError, match=rf'column_sums: {argument} must be "\w+", .* or "\w+", got \'{value}\''):
        kvcompress.column_sums(q, k, **{argument: value})


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_fuzz(data):
    draw = data.draw
    batch, num_kv_heads, q_per_kv = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seq_len, head_dim, window = draw(st.integers(1, 300)), 8 * draw(st.integers(1, 10)), draw(st.integers(1, 300))
    torch.manual_seed(draw(st.integers(0, 9999)))
    q, k = make(
        batch, num_kv_heads * q_per_kv, num_kv_heads, window, seq_len, head_dim, draw(st.sampled_from(cases.FLOATS))
    )
    statistic = draw(st.sampled_from([*PLAIN, *CHANGES]))
    options = {"statistic": statistic, "group_reduce": draw(st.sampled_from(GROUPS))}
    if statistic in CHANGES:
        options.update(outputs(q, k))
    if draw(st.booleans()):
        options["query_positions"] = ascending(batch, window, seq_len + 5, "cpu", low=-1)
    else:
        options["first_query"] = draw(st.integers(0, seq_len + 5))
    if draw(st.booleans()):
        options["query_weights"] = torch.rand(batch, num_kv_heads * q_per_kv, window)
    if draw(st.booleans()):
        options["seq_start"] = torch.randint(0, seq_len + 1, (batch,), dtype=torch.int32)
    check(q, k, **options)


def samples(device):
    q, k = make(2, 4, 2, 50, 50, 16, torch.bfloat16, device)
    lse, weights = torch.full((2, 4, 50), 5.0, device=device), torch.rand(2, 4, 50, device=device)
    start, positions = cases.left_padding(2, 50, device), ascending(2, 50, 50, device)
    v, output = torch.randn_like(k), torch.randn_like(q)
    return [
        (q, k, None, None, None, None, None, None, 0, 0, 1, 0.25),
        (q.float(), k.float(), lse, weights, positions, start, None, None, 0, 3, 0, 0.25),
        (q, k, lse, None, None, start, v, output, 0, 5, 3, 0.25),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "q": torch.randn(2, 8, 20, 16, device=device),
            "k": torch.randn(2, 2, 20, 16, device=device),
            "lse": torch.zeros(2, 8, 20, device=device),
            "query_weights": torch.ones(2, 8, 20, device=device),
            "query_positions": torch.arange(20, dtype=torch.int32, device=device).repeat(2, 1),
            "seq_start": torch.zeros(2, dtype=torch.int32, device=device),
            "v": None,
            "output": None,
            "first_query": 0,
            "statistic": 0,
            "group_reduce": 1,
            "softmax_scale": 0.25,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def full(*shape, dtype=torch.float32):
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


def changing(**changes):
    """The same for a change of the output."""
    return wrong(**{"v": full(2, 2, 20, 16), "output": full(2, 8, 20, 16), "statistic": 4, **changes})


NAME = "column_sums"
BAD = [
    Bad("rank_q", wrong(q=full(8, 4, 16)), f"{NAME}: q must be [batch, num_q_heads, window, head_dim], got 3D [8, 4, 16]"),
    Bad("rank_k", wrong(k=full(20, 16)), f"{NAME}: k must be [batch, num_kv_heads, seq_len, head_dim], got 2D [20, 16]"),
    Bad("dtype", wrong(q=full(2, 8, 4, 16, dtype=torch.float64)), f"{NAME}: q must be float32, float16 or bfloat16, got float64"),
    Bad("mixed", wrong(k=full(2, 2, 20, 16, dtype=torch.float16)), f"{NAME}: k must be of the dtype of q (float32), got float16"),
    Bad("head_dims", wrong(k=full(2, 2, 20, 24)), f"{NAME}: k must be of the head_dim of q (16), got 24"),
    Bad("heads", wrong(k=full(2, 3, 20, 16)), f"{NAME}: num_q_heads must be a multiple of num_kv_heads (3), got 8"),
    Bad("window", wrong(q=full(2, 8, 0, 16)), f"{NAME}: window must be at least 1, got 0"),
    Bad("stride_q", wrong(q=lambda d: torch.ones(2, 8, 16, 20, device=d).mT), f"{NAME}: q must be contiguous in the last dimension, got a last stride of 20"),
    Bad("lse", wrong(lse=full(2, 8, 5)), f"{NAME}: lse must be [batch, num_q_heads, window] [2, 8, 20], got 3D [2, 8, 5]"),
    Bad("weights", wrong(query_weights=full(2, 2, 20)), f"{NAME}: query_weights must be [batch, num_q_heads, window] [2, 8, 20], got 3D [2, 2, 20]"),
    Bad("weights_dtype", wrong(query_weights=full(2, 8, 20, dtype=torch.float16)), f"{NAME}: query_weights must be float32, got float16"),
    Bad("positions", wrong(query_positions=full(2, 21, dtype=torch.int32)), f"{NAME}: query_positions must be [batch, window] [2, 20], got 2D [2, 21]"),
    Bad("positions_dtype", wrong(query_positions=full(2, 20, dtype=torch.int64)), f"{NAME}: query_positions must be int32, got int64"),
    Bad(
        "positions_order",
        wrong(query_positions=lambda d: torch.tensor([[*range(19), 3]] * 2, dtype=torch.int32, device=d)),
        f"{NAME}: query_positions must be at least -1 and ascending, got 3 at [0, 19]",
        reads_data=True,
    ),
    Bad("seq_start", wrong(seq_start=full(3, dtype=torch.int32)), f"{NAME}: seq_start must be [batch] (2), got 1D [3]"),
    Bad("first_query", wrong(first_query=-1), f"{NAME}: first_query must be at least 0, got -1"),
    Bad("statistic", wrong(statistic=7), f"{NAME}: statistic must be a code from 0 to 6, got 7"),
    Bad("group_reduce", wrong(group_reduce=4), f"{NAME}: group_reduce must be 0 (none), 1 (mean), 2 (max) or 3 (sum), got 4"),
    Bad("softmax_scale", wrong(softmax_scale=0.0), f"{NAME}: softmax_scale must be finite and above 0, got 0.000000"),
    Bad("stray_v", wrong(v=full(2, 2, 20, 16)), f"{NAME}: v must be absent without a change of the output, got a tensor"),
    Bad("no_v", changing(v=None), f"{NAME}: v must be given for a change of the output, got None"),
    Bad("no_output", changing(output=None), f"{NAME}: output must be given for a change of the output, got None"),
    Bad("shape_v", changing(v=full(2, 2, 21, 16)), f"{NAME}: v must be of the shape of k [2, 2, 20, 16], got [2, 2, 21, 16]"),
    Bad("output_dtype", changing(output=full(2, 8, 20, 16, dtype=torch.float16)), f"{NAME}: output must be of the dtype of q (float32), got float16"),
]  # fmt: skip
