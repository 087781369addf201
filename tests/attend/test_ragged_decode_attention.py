"""ragged_decode_attention against float64, and its promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.attend.test_decode_attention import apart, assert_close, full, int32, make
from tests.bad_inputs import Bad
from tests.reference import attend as reference

INF = float("inf")
NAN = float("nan")


def pack(lengths, q_per_kv, num_queries, head_dim, dtype=torch.float32, device="cpu", batch=1, room=5):
    """q, k, v, row_start, lengths: heads in shuffled order, NaN in the room behind each."""
    stores = len(lengths)
    q = torch.randn(batch, stores // batch * q_per_kv, num_queries, head_dim, device=device).to(dtype)
    total = sum(lengths) + room * stores
    k, v = torch.randn(2, total, head_dim, device=device)
    k[::7] *= 3
    k, v = k.to(dtype), v.to(dtype)
    start, at = [0] * stores, 0
    for store in torch.randperm(stores).tolist():
        start[store] = at
        at += lengths[store] + room
        k[at - room : at] = NAN
        v[at - room : at] = NAN
    return q, k, v, torch.tensor(start, device=device), int32(lengths, device)


def check(q, k, v, row_start, lengths, **options):
    options.setdefault("max_length", int(lengths.max()) if len(lengths) else 0)
    args = (q, k, v, row_start, lengths)
    got = kvcompress.ragged_decode_attention(*args, return_logits=True, **options)
    expected = reference.ragged_decode_attention(*args, **options)
    plain = reference.ragged_decode_attention(*args, **options, dtype=torch.float32)
    assert_close(got, expected, plain, q, k, options.get("softmax_scale"))
    out, lse, none = kvcompress.ragged_decode_attention(*args, **options)
    assert torch.equal(out, got[0])
    assert torch.equal(lse, got[1])
    assert none.shape == (0,)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("q_per_kv", [1, 4, 8, 16])
@pytest.mark.parametrize("num_queries", [1, 3, 8])
def test_against_float64(dtype, head_dim, q_per_kv, num_queries, device):
    check(*pack([100, 0, 333, 1, 17, 64], q_per_kv, num_queries, head_dim, dtype, device, batch=2))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("num_queries", [1, 8])
def test_one_head_with_ten_times_the_entries(dtype, num_queries, device):
    lengths = [1000] * 8
    lengths[3] = 10_000
    check(*pack(lengths, 4, num_queries, 128, dtype, device))


@pytest.mark.parametrize("lengths", [[0, 0, 0, 5000], [5000, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
def test_empty_heads(lengths, device):
    check(*pack(lengths, 4, 2, 64, torch.bfloat16, device, batch=2), max_length=min(sum(lengths) + 20, 5000))


def test_room_for_max_length(device):
    q, k, v, start, lengths = pack([50, 3, 20, 9], 2, 1, 64, torch.float16, device, room=100)
    check(q, k, v, start, lengths, max_length=150)
    check(q, k, v, start, lengths, softmax_scale=0.4)


@pytest.mark.parametrize("num_queries", [1, 8])
def test_many_short_heads(num_queries, device):
    """More heads than workers."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 200, (1200,), generator=generator).tolist()
    check(*pack(lengths, 3, num_queries, 64, torch.bfloat16, device, batch=4))


def test_as_the_dense_store(device):
    """Equal lengths in one buffer: the same entries, the same split, the same bits."""
    q, k, v = make(2, 8, 2, 3, 200, 64, torch.bfloat16, device)
    lengths = int32([130, 77], device)
    start = torch.arange(4, device=device) * 200
    per_store = lengths.repeat_interleave(2)
    got = kvcompress.ragged_decode_attention(
        q, k.flatten(0, 2), v.flatten(0, 2), start, per_store, max_length=200, return_logits=True
    )
    expected = kvcompress.decode_attention(q, k, v, lengths=lengths, return_logits=True)
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


def test_strided_views(device):
    args = pack([100, 40, 7, 60], 4, 2, 64, torch.bfloat16, device)
    expected = kvcompress.ragged_decode_attention(*args, max_length=100, return_logits=True)
    views = [cases.strided(x) for x in args[:3]]
    got = kvcompress.ragged_decode_attention(*views, *args[3:], max_length=100, return_logits=True)
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_bitwise_run_to_run(dtype, device):
    args = pack([3000, 10, 500, 0], 4, 2, 128, dtype, device)
    first = kvcompress.ragged_decode_attention(*args, max_length=3000, return_logits=True)
    for _ in range(5):
        again = kvcompress.ragged_decode_attention(*args, max_length=3000, return_logits=True)
        assert all(torch.equal(x, y) for x, y in zip(again, first))


def test_empty(device):
    q = torch.empty(0, 4, 1, 64, device=device)
    k = torch.empty(0, 64, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    out, lse, logits = kvcompress.ragged_decode_attention(q, k, k, none, none.int(), max_length=0, return_logits=True)
    assert (out.shape, lse.shape, logits.shape) == ((0, 4, 1, 64), (0, 4, 1), (0, 4, 1, 0))
    check(*pack([0, 0], 2, 1, 64, device=device, room=0))


@pytest.mark.cuda
def test_in_a_cuda_graph():
    """One captured graph serves heads that grow and shrink."""
    q, k, v, start, lengths = pack([100, 4000, 0, 30], 4, 1, 128, torch.bfloat16, "cuda")
    run = lambda: kvcompress.ragged_decode_attention(q, k, v, start, lengths, max_length=4000)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, _ = run()
    for values in ([100, 4000, 0, 30], [99, 1, 0, 29], [0, 3999, 0, 0]):
        lengths.copy_(int32(values, "cuda"))
        graph.replay()
        expected = run()
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    q_per_kv=st.integers(1, 9),
    num_queries=st.integers(1, 8),
    longest=st.sampled_from([1, 20, 300]),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    dtype=st.sampled_from(cases.FLOATS),
    seed=st.integers(0, 9999),
)
def test_fuzz(batch, num_kv_heads, q_per_kv, num_queries, longest, head_dim, dtype, seed):
    torch.manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (batch * num_kv_heads,)).tolist()
    check(*pack(lengths, q_per_kv, num_queries, head_dim, dtype, batch=batch, room=seed % 3))


def samples(device):
    args = pack([20, 3, 0, 11], 4, 3, 24, torch.bfloat16, device, batch=2)
    return [(*args, 20, 0.2, False), (*args, 20, 0.2, True)]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "q": torch.randn(2, 8, 3, 16, device=device),
            "k": torch.randn(40, 16, device=device),
            "v": torch.randn(40, 16, device=device),
            "row_start": torch.arange(0, 40, 10, device=device),
            "lengths": int32([10, 5, 0, 8], device),
            "max_length": 10,
            "softmax_scale": 0.25,
            "return_logits": True,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def both(*shape, **options):
    return {"k": full(*shape, **options), "v": full(*shape, **options)}


NAME = "ragged_decode_attention"
STORES = "[batch * num_kv_heads]"
BAD = [
    Bad(
        "rank_q",
        wrong(q=full(8, 3, 16)),
        f"{NAME}: q must be [batch, num_q_heads, num_queries, head_dim], got 3D [8, 3, 16]",
    ),
    Bad("rank_k", wrong(k=full(1, 40, 16)), f"{NAME}: k must be [total, head_dim], got 3D [1, 40, 16]"),
    Bad("rank_v", wrong(v=full(1, 40, 16)), f"{NAME}: v must be [total, head_dim], got 3D [1, 40, 16]"),
    Bad(
        "dtype",
        wrong(q=full(2, 8, 3, 16, dtype=torch.int32)),
        f"{NAME}: q must be float32, float16 or bfloat16, got int32",
    ),
    Bad(
        "mixed",
        wrong(v=full(40, 16, dtype=torch.bfloat16)),
        f"{NAME}: v must be of the dtype of q (float32), got bfloat16",
    ),
    Bad("shape_v", wrong(v=full(41, 16)), f"{NAME}: v must be of the shape of k [40, 16], got [41, 16]"),
    Bad("head_dims", wrong(**both(40, 24)), f"{NAME}: k must be of the head_dim of q (16), got 24"),
    Bad(
        "head_dim",
        wrong(q=full(2, 8, 3, 12), **both(40, 12)),
        f"{NAME}: head_dim must be a multiple of 8 from 8 to 256, got 12",
    ),
    Bad("nine_queries", wrong(q=full(2, 8, 9, 16)), f"{NAME}: num_queries must be from 1 to 8, got 9"),
    Bad(
        "lengths_batch",
        wrong(lengths=full(5, dtype=torch.int32)),
        f"{NAME}: lengths must be {STORES}, a multiple of the batch of q (2), got 1D [5]",
    ),
    Bad(
        "lengths_rank",
        wrong(lengths=full(2, 2, dtype=torch.int32)),
        f"{NAME}: lengths must be {STORES}, a multiple of the batch of q (2), got 2D [2, 2]",
    ),
    Bad("no_kv_heads", wrong(lengths=full(0, dtype=torch.int32)), f"{NAME}: num_kv_heads must be at least 1, got 0"),
    Bad(
        "heads",
        wrong(lengths=full(6, dtype=torch.int32)),
        f"{NAME}: num_q_heads must be a multiple of num_kv_heads (3), got 8",
    ),
    Bad(
        "stride_k",
        wrong(k=apart(40, 16)),
        f"{NAME}: k must be contiguous in the last dimension, got a last stride of 40",
    ),
    Bad("lengths_dtype", wrong(lengths=full(4, dtype=torch.int64)), f"{NAME}: lengths must be int32, got int64"),
    Bad(
        "row_start", wrong(row_start=full(5, dtype=torch.int64)), f"{NAME}: row_start must be {STORES} (4), got 1D [5]"
    ),
    Bad("row_start_dtype", wrong(row_start=full(4, dtype=torch.int32)), f"{NAME}: row_start must be int64, got int32"),
    Bad("max_length", wrong(max_length=41), f"{NAME}: max_length must be from 0 to the rows of k (40), got 41"),
    Bad(
        "max_length_negative", wrong(max_length=-1), f"{NAME}: max_length must be from 0 to the rows of k (40), got -1"
    ),
    Bad("scale", wrong(softmax_scale=INF), f"{NAME}: softmax_scale must be finite and above 0, got inf"),
    Bad(
        "length",
        wrong(lengths=lambda d: int32([10, 5, -1, 8], d)),
        f"{NAME}: lengths must be from 0 to max_length (10), got -1 at [2]",
        reads_data=True,
    ),
]
