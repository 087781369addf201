"""observed_decode_attention_: sums and history against float64, attention as without."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.attend.test_decode_attention import both, full, int32, make
from tests.attend.test_decode_attention import wrong as wrong_plain
from tests.bad_inputs import Bad
from tests.reference import attend as reference

INF, NAN = float("inf"), float("nan")


def rounding(q, k, softmax_scale=None):
    """What the roundings of the dot products and of the scaling do to a logit: see assert_close of decode_attention."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    largest = q.abs().double().flatten(0, -2).sum(-1).amax() * k.abs().nan_to_num(0).amax().double()
    return torch.finfo(torch.float32).eps * (4 + float(largest) * scale)


def assert_watched(got, expected, plain, walk):
    """Twice the error of plain float32 torch, and the rounding of the logits; untouched slots exactly."""
    got, expected, plain = got.double().cpu(), expected.cpu(), plain.double().cpu()
    assert torch.equal(got.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    assert torch.equal(got[~finite].nan_to_num(7), expected[~finite].nan_to_num(7))
    if finite.any():
        error = (got - expected)[finite].abs().max()
        allowed = 2 * (plain - expected)[finite].abs().max() + walk * expected[finite].abs().max().clamp(min=1)
        assert error <= allowed, f"{error:.3g} against {allowed:.3g}"


def check(q, k, v, *, lengths=None, sums=None, weights=None, history=None, seen=None, softmax_scale=None, **how):
    watched = {"sums": sums, "weights": weights, "history": history, "seen": seen}
    found = {}
    for dtype in (torch.float64, torch.float32):
        _, lse, logits = reference.decode_attention(q, k, v, lengths=lengths, softmax_scale=softmax_scale, dtype=dtype)
        start = {name: x.clone() if x is not None and name in ("sums", "history") else x for name, x in watched.items()}
        found[dtype] = reference.observe(lse, logits, lengths, num_kv_heads=k.shape[1], **start, **how)
    plain = kvcompress.decode_attention(q, k, v, lengths=lengths, softmax_scale=softmax_scale)
    got = kvcompress.observed_decode_attention_(q, k, v, lengths=lengths, softmax_scale=softmax_scale, **watched, **how)
    assert torch.equal(got[0].nan_to_num(3), plain[0].nan_to_num(3))
    assert torch.equal(got[1].nan_to_num(3), plain[1].nan_to_num(3))
    for ours, expected, single in zip((sums, history), found[torch.float64], found[torch.float32]):
        if ours is not None:
            assert_watched(ours, expected, single, rounding(q, k, softmax_scale))


def some(shape, device, fill=NAN):
    """Old content, with `fill` in a few slots."""
    x = torch.rand(shape, device=device)
    x[..., 1::7] = fill
    return x


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("q_per_kv", [1, 4, 8, 16])
@pytest.mark.parametrize("num_queries", [1, 3, 8])
def test_against_float64(dtype, head_dim, q_per_kv, num_queries, device):
    q, k, v = make(3, 2 * q_per_kv, 2, num_queries, 333, head_dim, dtype, device)
    lengths = int32([333, 70, 129], device)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = NAN
        v[b, :, n:] = NAN
    sums = some((3, 2, 333), device)
    history = torch.full((3, 2, 333, 5), 3.5, device=device)
    check(q, k, v, lengths=lengths, sums=sums, history=history, seen=lengths + 11, group_reduce="mean")


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("num_queries", [1, 4])
def test_how(decay, power, group_reduce, num_queries, device):
    q, k, v = make(2, 12, 3, num_queries, 100, 64, torch.bfloat16, device)
    how = {"decay": decay, "power": power, "group_reduce": group_reduce}
    check(q, k, v, sums=some((2, 3, 100), device), weights=torch.rand(2, 3, 100, device=device), **how)
    check(q, k, v, sums=some((2, 12, 100), device), **how)  # a row a query head
    history = torch.zeros(2, 12, 100, 3, device=device)
    check(q, k, v, history=history, seen=int32([[7], [2]], device), group_reduce=group_reduce)


@pytest.mark.parametrize("stores", [8, 132, 500])
@pytest.mark.parametrize("q_per_kv", [1, 2, 8])
def test_as_many_stores_as_workers(stores, q_per_kv, device):
    """One length for all; where stores are many, a worker has one or more whole ones."""
    q, k, v = make(1, q_per_kv * stores, stores, 1, 70, 64, torch.bfloat16, device)
    lengths = int32([69], device)
    check(q, k, v, lengths=lengths, sums=some((1, stores, 70), device), decay=0.5)
    history = torch.zeros(1, q_per_kv * stores, 70, 2, device=device)
    check(q, k, v, lengths=lengths, sums=some((1, q_per_kv * stores, 70), device), history=history, seen=lengths)


@pytest.mark.parametrize("capacity", [1, 15, 16, 17, 129, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_sizes(capacity, dtype, device):
    q, k, v = make(2, 8, 2, 2, capacity, 64, dtype, device)
    check(q, k, v, sums=some((2, 2, capacity), device), decay=0.9)


def test_lengths_of_heads(device):
    """Slots behind the entries stay as they are; a head may be empty."""
    q, k, v = make(2, 8, 4, 3, 200, 128, torch.bfloat16, device)
    lengths = int32([[200, 0, 1, 60], [3, 2, 199, 64]], device)
    history = torch.full((2, 4, 200, 4), 2.0, device=device)
    check(q, k, v, lengths=lengths, sums=some((2, 4, 200), device), history=history, seen=lengths + 5)


def test_overwriting_reads_nothing(device):
    q, k, v = make(1, 4, 2, 1, 50, 64, device=device)
    sums = torch.full((1, 2, 50), NAN, device=device)
    kvcompress.observed_decode_attention_(q, k, v, sums=sums, decay=0.0)
    torch.testing.assert_close(sums.sum(-1), torch.ones(1, 2, device=device))


def test_steps_add_up(device):
    """Token by token equals all at once: the queries of one call see what they would have seen one by one."""
    q, k, v = make(2, 8, 2, 5, 60, 64, device=device)
    at_once, one = torch.zeros(2, 2, 60, device=device), torch.zeros(2, 2, 60, device=device)
    rows, row = torch.zeros(2, 2, 60, 8, device=device), torch.zeros(2, 2, 60, 8, device=device)
    seen = int32([60, 60], device)
    kvcompress.observed_decode_attention_(q, k, v, sums=at_once, history=rows, seen=seen, decay=0.7)
    for i in range(5):
        n = seen - 4 + i
        kvcompress.observed_decode_attention_(
            q[:, :, i : i + 1], k, v, lengths=n, sums=one, history=row, seen=n, decay=0.7
        )
    torch.testing.assert_close(one, at_once, rtol=1e-5, atol=1e-7)
    row[:, :, 56:] = torch.where(row[:, :, 56:] == 0, -INF, row[:, :, 56:])  # not written before the entry was there
    rows[:, :, 56:] = torch.where(rows[:, :, 56:] == 0, -INF, rows[:, :, 56:])
    torch.testing.assert_close(row, rows, rtol=1e-5, atol=1e-5)


def test_nan_is_seen(device):
    q, k, v = make(1, 4, 2, 1, 100, 64, device=device)
    k[0, 1, 50, 3] = NAN
    sums, history = torch.zeros(1, 2, 100, device=device), torch.zeros(1, 2, 100, 1, device=device)
    kvcompress.observed_decode_attention_(q, k, v, sums=sums, history=history, seen=int32([0], device))
    assert sums[0, 1].isnan().all()
    assert sums[0, 0].isfinite().all()
    assert history.isnan().sum() == 1


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_bitwise_run_to_run(dtype, device):
    q, k, v = make(2, 8, 2, 2, 3000, 128, dtype, device)
    runs = []
    for _ in range(4):
        sums = torch.ones(2, 2, 3000, device=device)
        runs.append((*kvcompress.observed_decode_attention_(q, k, v, sums=sums, decay=0.9), sums))
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0]))


def test_strided_views(device):
    q, k, v = make(2, 8, 2, 3, 150, 64, torch.bfloat16, device)
    sums, rows = torch.rand(2, 2, 150, device=device), torch.rand(2, 2, 150, 6, device=device)
    seen = int32([150, 150], device)
    expected_sums, expected_rows = sums.clone(), rows.clone()
    kvcompress.observed_decode_attention_(q, k, v, sums=expected_sums, history=expected_rows, seen=seen)
    wide = torch.zeros(2, 150, 5, 150, device=device)
    view = wide.transpose(1, 2)[:, 1:5:2, 7]  # [batch, heads, capacity], strides of its own
    view.copy_(sums)
    history = cases.strided(rows)
    kvcompress.observed_decode_attention_(q, k, v, sums=view, history=history, seen=seen)
    assert torch.equal(view, expected_sums)
    assert torch.equal(history, expected_rows)


def test_a_decode_loop(device):
    """evict_append_ and observed_decode_attention_ step by step: H2O at constant size against the whole history."""
    torch.manual_seed(5)
    capacity, window, steps, dim = 12, 4, 30, 16
    keys, values = torch.randn(2, 1, 2, steps, dim, device=device)
    queries = torch.randn(1, 4, steps, dim, device=device)
    buffers = [torch.full((1, 2, capacity, dim), NAN, device=device) for _ in range(2)]
    sums = torch.full((1, 2, capacity), NAN, device=device)
    positions = torch.zeros(1, 2, capacity, dtype=torch.int32, device=device)
    lengths, seen = torch.zeros(2, 1, 2, dtype=torch.int32, device=device)
    kept, mass = [list[int](), list[int]()], [dict[int, float](), dict[int, float]()]
    for t in range(steps):
        rows = [keys[:, :, t : t + 1], values[:, :, t : t + 1]]
        kvcompress.evict_append_(buffers, rows, positions, lengths, seen, scores=sums, window=window)
        q = queries[:, :, t : t + 1]
        out, _ = kvcompress.observed_decode_attention_(q, *buffers, lengths=lengths, sums=sums)
        for h in range(2):
            if len(kept[h]) == capacity:
                free = [j for j in kept[h] if j < t - window]
                kept[h].remove(min(free, key=lambda j, h=h: (mass[h][j], -j)))
            kept[h].append(t)
            mass[h][t] = 0.0
            x = (queries[0, 2 * h : 2 * h + 2, t].double() @ keys[0, h, kept[h]].double().mT) * dim**-0.5
            p = x.softmax(-1)
            for j, add in zip(kept[h], p.mean(0).tolist()):
                mass[h][j] += add
            n = int(lengths[0, h])
            assert sorted(positions[0, h, :n].tolist()) == kept[h]
            expected = p @ values[0, h, kept[h]].double()
            torch.testing.assert_close(out[0, 2 * h : 2 * h + 2, 0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_in_a_cuda_graph():
    """One captured step serves a growing store, and its sums grow as in eager."""
    q, k, v = make(2, 8, 2, 1, 4000, 128, torch.bfloat16, "cuda")
    lengths, sums = int32([10, 700], "cuda"), torch.zeros(2, 2, 4000, device="cuda")
    eager = sums.clone()
    kvcompress.observed_decode_attention_(q, k, v, lengths=lengths, sums=sums.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = kvcompress.observed_decode_attention_(q, k, v, lengths=lengths, sums=sums)
    for values in ([10, 700], [11, 4000], [0, 1], [2500, 2501]):
        lengths.copy_(int32(values, "cuda"))
        graph.replay()
        expected, _ = kvcompress.observed_decode_attention_(q, k, v, lengths=lengths, sums=eager)
        assert torch.equal(out, expected)
        assert torch.equal(sums, eager)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    q_per_kv=st.integers(1, 9),
    num_queries=st.integers(1, 8),
    capacity=st.integers(1, 300),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    dtype=st.sampled_from(cases.FLOATS),
    decay=st.sampled_from([0.0, 0.9, 1.0]),
    by_head=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_fuzz(batch, num_kv_heads, q_per_kv, num_queries, capacity, head_dim, dtype, decay, by_head, seed):
    torch.manual_seed(seed)
    heads = num_kv_heads * (q_per_kv if by_head else 1)
    q, k, v = make(batch, num_kv_heads * q_per_kv, num_kv_heads, num_queries, capacity, head_dim, dtype)
    lengths = torch.randint(0, capacity + 1, (batch, num_kv_heads), dtype=torch.int32)
    history = torch.zeros(batch, heads, capacity, 4)
    watched = {"sums": some((batch, heads, capacity), "cpu"), "history": history, "seen": lengths + 3}
    check(q, k, v, lengths=lengths, decay=decay, **watched)


def samples(device):
    q, k, v = make(2, 8, 2, 3, 40, 24, torch.bfloat16, device)
    lengths = int32([[40, 7], [0, 30]], device)
    history = torch.rand(2, 8, 40, 5, device=device)
    sums, weights = torch.rand(2, 2, 40, device=device), torch.rand(2, 2, 40, device=device)
    return [
        (q, k, v, lengths, sums, weights, history, lengths, 0.2, 0.5, 2, 3),
        (q.float(), k.float(), v.float(), None, torch.rand(2, 8, 40, device=device), None, None, None, 0.2, 1.0, 1, 1),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            **dict(zip(("q", "k", "v", "lengths"), wrong_plain()(device))),
            "sums": torch.ones(2, 2, 20, device=device),
            "weights": torch.ones(2, 2, 20, device=device),
            "history": torch.ones(2, 8, 20, 3, device=device),
            "seen": int32([20, 5], device),
            "softmax_scale": 0.25,
            "decay": 1.0,
            "power": 1,
            "group_reduce": 1,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def overlapping(*shape):
    return lambda device: torch.ones(1, *shape[1:], device=device).expand(shape)


NAME = "observed_decode_attention_"
FIT = "of the batch (2), 2 or 8 heads and the capacity (20) of k"
BAD = [
    Bad(
        "rank_q",
        wrong(q=full(8, 3, 16)),
        f"{NAME}: q must be [batch, num_q_heads, num_queries, head_dim], got 3D [8, 3, 16]",
    ),
    Bad("head_dims", wrong(**both(2, 2, 20, 24)), f"{NAME}: k must be of the head_dim of q (16), got 24"),
    Bad(
        "lengths",
        wrong(lengths=full(2, 3, dtype=torch.int32)),
        f"{NAME}: lengths must be [batch] (2), [batch, 1] or [batch, num_kv_heads] (2), got 2D [2, 3]",
    ),
    Bad(
        "nothing",
        wrong(sums=None, weights=None, history=None),
        f"{NAME}: sums must be there unless history is, got neither",
    ),
    Bad("weights_alone", wrong(sums=None), f"{NAME}: weights must be absent without sums, got weights"),
    Bad("no_seen", wrong(seen=None), f"{NAME}: seen must be there with history, got none"),
    Bad("sums_rank", wrong(sums=full(2, 20)), f"{NAME}: sums must be [batch, heads, capacity], got 2D [2, 20]"),
    Bad("sums_heads", wrong(sums=full(2, 4, 20)), f"{NAME}: sums must be {FIT}, got [2, 4, 20]"),
    Bad("sums_capacity", wrong(sums=full(2, 2, 21)), f"{NAME}: sums must be {FIT}, got [2, 2, 21]"),
    Bad("sums_dtype", wrong(sums=full(2, 2, 20, dtype=torch.float16)), f"{NAME}: sums must be float32, got float16"),
    Bad("sums_overlap", wrong(sums=overlapping(2, 2, 20)), f"{NAME}: sums must be free of overlaps, got a stride of 0"),
    Bad(
        "weights",
        wrong(weights=full(2, 8, 20)),
        f"{NAME}: weights must be of the batch (2), 2 heads and the capacity (20) of k, got [2, 8, 20]",
    ),
    Bad(
        "history_rank",
        wrong(history=full(2, 2, 20)),
        f"{NAME}: history must be [batch, heads, capacity, width], got 3D [2, 2, 20]",
    ),
    Bad("history", wrong(history=full(2, 2, 19, 3)), f"{NAME}: history must be {FIT}, got [2, 2, 19, 3]"),
    Bad(
        "history_width",
        wrong(history=full(2, 2, 20, 0)),
        f"{NAME}: history must be of a width of at least 1, got [2, 2, 20, 0]",
    ),
    Bad("decay", wrong(decay=1.5), f"{NAME}: decay must be from 0 to 1, got 1.500000"),
    Bad("decay_nan", wrong(decay=NAN), f"{NAME}: decay must be from 0 to 1, got nan"),
    Bad("power", wrong(power=3), f"{NAME}: power must be 1 or 2, got 3"),
    Bad("group_reduce", wrong(group_reduce=0), f"{NAME}: group_reduce must be 1 (mean), 2 (max) or 3 (sum), got 0"),
    Bad(
        "seen",
        wrong(seen=full(3, dtype=torch.int32)),
        f"{NAME}: seen must be [batch] (2), [batch, 1] or [batch, num_kv_heads] (2), got 1D [3]",
    ),
    Bad("seen_dtype", wrong(seen=full(2)), f"{NAME}: seen must be int32, got float32"),
    Bad(
        "rows",
        wrong(q=full(2, 1024, 3, 16), sums=full(2, 2, 20), history=None),
        f"{NAME}: q must be of at most 1024 queries a kv head, num_queries times q_per_kv, got 1536",
    ),
    Bad(
        "length",
        wrong(lengths=lambda d: int32([3, 21], d)),
        f"{NAME}: lengths must be from 0 to the capacity (20), got 21 at [1]",
        reads_data=True,
    ),
]
