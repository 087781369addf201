"""decode_attention against float64, and its promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import attend as reference

INF = float("inf")
NAN = float("nan")


def make(
    batch, num_q_heads, num_kv_heads, num_queries, capacity, head_dim, dtype=torch.float32, device="cpu", heavy=3.0
):
    """Queries, keys and values with a few heavy keys, so that softmax is neither flat nor one-hot."""
    q = torch.randn(batch, num_q_heads, num_queries, head_dim, device=device)
    k, v = torch.randn(2, batch, num_kv_heads, capacity, head_dim, device=device)
    k[:, :, :: max(capacity // 5, 1)] *= heavy
    return q.to(dtype), k.to(dtype), v.to(dtype)


def assert_close(got, expected, plain, q, k, scale=None):
    """Twice the error of plain float32 torch, rounded to the dtype, and the rounding of the dot products.

    A running sum of products is rounded once a step; as a random walk these roundings reach about eps / 2 of the sum of
    absolute products, and the logit brings them to the exponent of every probability.
    """
    dtype, eps = q.dtype, torch.finfo(torch.float32).eps
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    largest = q.abs().double().flatten(0, -2).sum(-1).amax() * (
        k.abs().nan_to_num(0).amax().double() if k.numel() else 0
    )
    walk = eps * (4 + float(largest.cpu()) * scale)
    for name, x, y, z in zip(("out", "lse", "logits"), got, expected, plain):
        assert x.dtype == (dtype if name == "out" else torch.float32), name
        assert x.shape == y.shape, name
        x, y, z = x.cpu(), y.cpu(), z.to(x.dtype).cpu()
        assert torch.equal(x.isfinite(), y.isfinite()), name
        finite = y.isfinite()
        assert torch.equal(x[~finite].double().nan_to_num(1), y[~finite].nan_to_num(1)), name
        if finite.any():
            error = (x.double() - y)[finite].abs().max()
            plain_error = (z.double() - y)[finite].abs().max()
            rounding = walk * max(1, float(y[finite].abs().max()))
            assert error <= 2 * plain_error + rounding, (
                f"{name}: {error:.3g} against {plain_error:.3g} + {rounding:.3g}"
            )


def check(q, k, v, **options):
    got = kvcompress.decode_attention(q, k, v, return_logits=True, **options)
    expected = reference.decode_attention(q, k, v, **options)
    plain = reference.decode_attention(q, k, v, **options, dtype=torch.float32)
    assert_close(got, expected, plain, q, k, options.get("softmax_scale"))
    out, lse, none = kvcompress.decode_attention(q, k, v, **options)
    assert torch.equal(out, got[0])
    assert torch.equal(lse, got[1])
    assert none.shape == (0,)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("q_per_kv", [1, 4, 8, 16])
@pytest.mark.parametrize("num_queries", [1, 3, 8])
def test_against_float64(dtype, head_dim, q_per_kv, num_queries, device):
    q, k, v = make(3, 2 * q_per_kv, 2, num_queries, 333, head_dim, dtype, device)
    lengths = int32([333, 70, 129], device)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = NAN  # room behind the entries
        v[b, :, n:] = NAN
    check(q, k, v, lengths=lengths)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("num_queries", [1, 3, 8])
@pytest.mark.parametrize("capacity", [1, 15, 16, 17, 63, 64, 65, 1000])
def test_sizes(dtype, num_queries, capacity, device):
    q, k, v = make(2, 8, 2, num_queries, capacity, 64, dtype, device)
    check(q, k, v)


@pytest.mark.parametrize("num_queries", [1, 8])
def test_lengths(num_queries, device):
    lengths = [0, 1, 2, 7, 8, 9, 63, 64, 65, 500]
    q, k, v = make(len(lengths), 8, 2, num_queries, 500, 128, torch.bfloat16, device)
    check(q, k, v, lengths=int32(lengths, device))


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_lengths_of_heads(dtype, device):
    """Every kv head has its own length, or all heads of a row share one."""
    q, k, v = make(3, 8, 4, 2, 300, 64, dtype, device)
    lengths = int32([[300, 2, 17, 0], [64, 65, 1, 299], [30, 30, 30, 30]], device)
    check(q, k, v, lengths=lengths)
    check(q, k, v, lengths=lengths.mT.contiguous().mT)
    one = int32([[7], [300], [80]], device)
    expected = kvcompress.decode_attention(q, k, v, lengths=one[:, 0], return_logits=True)
    got = kvcompress.decode_attention(q, k, v, lengths=one, return_logits=True)
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


@pytest.mark.parametrize("num_kv_heads", [1, 5, 160])
def test_many_stores(num_kv_heads, device):
    """Stores of every length below and above a tile, more of them than a block has threads."""
    lengths = (torch.arange(3 * num_kv_heads) * 7 % 41).view(3, num_kv_heads).int().to(device)
    q, k, v = make(3, 2 * num_kv_heads, num_kv_heads, 1, 41, 64, torch.bfloat16, device)
    check(q, k, v, lengths=lengths)


@pytest.mark.parametrize("stores", [120, 132, 135, 264, 500])
@pytest.mark.parametrize("num_queries", [1, 8])
def test_as_many_stores_as_workers(stores, num_queries, device):
    """One length for all, and stores enough that a worker has one or more whole ones."""
    q, k, v = make(1, 3 * stores, stores, num_queries, 50, 64, torch.bfloat16, device)
    check(q, k, v)
    known = kvcompress.decode_attention(q, k, v)
    found = kvcompress.decode_attention(q, k, v, lengths=int32([50], device))
    assert all(torch.equal(x, y) for x, y in zip(known, found))


def test_far_smaller_than_capacity(device):
    q, k, v = make(2, 8, 2, 1, 20_000, 64, torch.bfloat16, device)
    check(q, k, v, lengths=int32([3, 200], device))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("num_queries", [2, 8])
def test_long(dtype, num_queries, device):
    q, k, v = make(1, 8, 1, num_queries, 60_001, 128, dtype, device)
    check(q, k, v)


def test_nothing_visible(device):
    q, k, v = make(1, 4, 2, 3, 5, 64, device=device)
    out, lse, logits = kvcompress.decode_attention(q, k, v, lengths=int32([1], device), return_logits=True)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -INF).all()
    assert (logits[:, :, :2] == -INF).all()
    assert torch.equal(out[:, :, 2], v[:, :, 0].repeat_interleave(2, 1))


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_heavy_logits(dtype, device):
    """Logits of thousands: exp of them overflows, softmax must not."""
    q, k, v = make(1, 8, 2, 2, 300, 64, dtype, device, heavy=60.0)
    check(8 * q, k, v)
    check(8 * q, -8 * k.abs(), v)


def test_flat(device):
    """Equal logits: the output is the mean of the values, a small sum of large ones."""
    q, k, v = make(1, 4, 1, 1, 4000, 128, torch.bfloat16, device)
    check(torch.zeros_like(q), k, v)


def test_scale(device):
    q, k, v = make(2, 8, 2, 1, 200, 96, torch.float16, device)
    check(q, k, v, softmax_scale=0.3)


def test_many_heads_per_kv_head(device):
    q, k, v = make(1, 71, 1, 2, 150, 64, torch.bfloat16, device)
    check(q, k, v)
    q, k, v = make(2, 40, 1, 1, 150, 256, device=device)
    check(q, k, v)


def test_strided_views(device):
    q, k, v = make(2, 8, 2, 3, 150, 64, torch.bfloat16, device)
    expected = kvcompress.decode_attention(q, k, v, return_logits=True)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for views in ([cases.strided(x) for x in (q, k, v)], by_token):
        got = kvcompress.decode_attention(*views, return_logits=True)
        assert all(torch.equal(x, y) for x, y in zip(got, expected))


def test_unaligned_views(device):
    """Rows that start at no multiple of 16 bytes."""
    q, k, v = make(2, 8, 2, 1, 150, 64, torch.bfloat16, device)

    def shifted(x):
        view = torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=device)[..., 1:-2]
        return view.copy_(x)

    check(shifted(q), shifted(k), shifted(v))
    check(q, k, shifted(v))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("num_queries", [2, 8])
def test_bitwise_run_to_run(dtype, num_queries, device):
    q, k, v = make(2, 8, 2, num_queries, 3000, 128, dtype, device)
    lengths = int32([3000, 1234], device)
    first = kvcompress.decode_attention(q, k, v, lengths=lengths, return_logits=True)
    for _ in range(5):
        again = kvcompress.decode_attention(q, k, v, lengths=lengths, return_logits=True)
        assert all(torch.equal(x, y) for x, y in zip(again, first))


def test_any_number_of_threads():
    q, k, v = make(2, 8, 2, 1, 2000, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = kvcompress.decode_attention(q, k, v)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(kvcompress.decode_attention(q, k, v), first))


def test_nan_is_seen(device):
    q, k, v = make(1, 4, 2, 1, 100, 64, device=device)
    k[0, 1, 50, 3] = NAN
    out, lse, _ = kvcompress.decode_attention(q, k, v)
    assert out[0, 2:].isnan().all()
    assert lse[0, 2:].isnan().all()
    assert out[0, :2].isfinite().all()


def test_empty(device):
    q, k, v = make(0, 4, 2, 1, 10, 64, device=device)
    out, lse, logits = kvcompress.decode_attention(q, k, v, return_logits=True)
    assert (out.shape, lse.shape, logits.shape) == ((0, 4, 1, 64), (0, 4, 1), (0, 4, 1, 10))
    q, k, v = make(2, 4, 2, 1, 0, 64, device=device)
    out, lse, logits = kvcompress.decode_attention(q, k, v, return_logits=True)
    assert (out == 0).all()
    assert (lse == -INF).all()
    assert logits.shape == (2, 4, 1, 0)


def test_as_torch_attends(device):
    """The same numbers as torch's own attention, causal at the end of the row."""
    q, k, v = make(2, 8, 2, 4, 100, 64, device=device)
    visible = torch.ones(4, 100, dtype=torch.bool, device=device).tril(96)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    torch.testing.assert_close(kvcompress.decode_attention(q, k, v)[0], expected)


@pytest.mark.cuda
def test_in_a_cuda_graph():
    """One captured graph serves a growing store."""
    q, k, v = make(2, 8, 2, 1, 4000, 128, torch.bfloat16, "cuda")
    lengths = int32([10, 700], "cuda")
    kvcompress.decode_attention(q, k, v, lengths=lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, _ = kvcompress.decode_attention(q, k, v, lengths=lengths)
    for values in ([10, 700], [11, 4000], [0, 1], [2500, 2501]):
        lengths.copy_(int32(values, "cuda"))
        graph.replay()
        expected = kvcompress.decode_attention(q, k, v, lengths=lengths)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.cuda
def test_more_than_32_bit_offsets():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    k = torch.empty(1, 3, 2**23, 128, dtype=torch.bfloat16, device="cuda")  # 3 * 2^30 elements
    v = k
    q = torch.randn(1, 3, 1, 128, device="cuda").bfloat16()
    k[..., :300, :].normal_()
    check_length = int32([300], "cuda")
    out, lse, _ = kvcompress.decode_attention(q, k, v, lengths=check_length)
    expected = kvcompress.decode_attention(q, k[:, :, :300], v[:, :, :300])
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    q_per_kv=st.integers(1, 9),
    num_queries=st.integers(1, 8),
    capacity=st.integers(0, 300),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    dtype=st.sampled_from(cases.FLOATS),
    seed=st.integers(0, 9999),
)
def test_fuzz(batch, num_kv_heads, q_per_kv, num_queries, capacity, head_dim, dtype, seed):
    torch.manual_seed(seed)
    q, k, v = make(batch, num_kv_heads * q_per_kv, num_kv_heads, num_queries, capacity, head_dim, dtype)
    check(q, k, v, lengths=torch.randint(0, capacity + 1, (batch,), dtype=torch.int32))


def samples(device):
    q, k, v = make(2, 8, 2, 3, 40, 24, torch.bfloat16, device)
    return [
        (q, k, v, None, 0.2, False),
        (q.float(), k.float(), v.float(), int32([40, 7], device), 0.2, True),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "q": torch.randn(2, 8, 3, 16, device=device),
            "k": torch.randn(2, 2, 20, 16, device=device),
            "v": torch.randn(2, 2, 20, 16, device=device),
            "lengths": int32([20, 5], device),
            "softmax_scale": 0.25,
            "return_logits": True,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def full(*shape, dtype=torch.float32):
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


def apart(*shape):
    """Ones of a shape whose last dimension is not contiguous."""
    return lambda device: torch.ones(*shape[:-2], shape[-1], shape[-2], device=device).mT


def both(*shape, **options):
    return {"k": full(*shape, **options), "v": full(*shape, **options)}


NAME = "decode_attention"
BAD = [
    Bad(
        "rank_q",
        wrong(q=full(8, 3, 16)),
        f"{NAME}: q must be [batch, num_q_heads, num_queries, head_dim], got 3D [8, 3, 16]",
    ),
    Bad(
        "rank_k", wrong(k=full(20, 16)), f"{NAME}: k must be [batch, num_kv_heads, capacity, head_dim], got 2D [20, 16]"
    ),
    Bad(
        "rank_v", wrong(v=full(20, 16)), f"{NAME}: v must be [batch, num_kv_heads, capacity, head_dim], got 2D [20, 16]"
    ),
    Bad(
        "dtype",
        wrong(q=full(2, 8, 3, 16, dtype=torch.float64)),
        f"{NAME}: q must be float32, float16 or bfloat16, got float64",
    ),
    Bad(
        "mixed_k",
        wrong(k=full(2, 2, 20, 16, dtype=torch.float16)),
        f"{NAME}: k must be of the dtype of q (float32), got float16",
    ),
    Bad(
        "mixed_v",
        wrong(v=full(2, 2, 20, 16, dtype=torch.float16)),
        f"{NAME}: v must be of the dtype of q (float32), got float16",
    ),
    Bad(
        "shape_v",
        wrong(v=full(2, 2, 21, 16)),
        f"{NAME}: v must be of the shape of k [2, 2, 20, 16], got [2, 2, 21, 16]",
    ),
    Bad("head_dims", wrong(**both(2, 2, 20, 24)), f"{NAME}: k must be of the head_dim of q (16), got 24"),
    Bad(
        "head_dim",
        wrong(q=full(2, 8, 3, 20), **both(2, 2, 20, 20)),
        f"{NAME}: head_dim must be a multiple of 8 from 8 to 256, got 20",
    ),
    Bad(
        "head_dim_large",
        wrong(q=full(2, 8, 3, 264), **both(2, 2, 20, 264)),
        f"{NAME}: head_dim must be a multiple of 8 from 8 to 256, got 264",
    ),
    Bad("no_queries", wrong(q=full(2, 8, 0, 16)), f"{NAME}: num_queries must be from 1 to 8, got 0"),
    Bad("nine_queries", wrong(q=full(2, 8, 9, 16)), f"{NAME}: num_queries must be from 1 to 8, got 9"),
    Bad("batch", wrong(**both(3, 2, 20, 16)), f"{NAME}: k must be of the batch of q (2), got 3"),
    Bad("no_kv_heads", wrong(**both(2, 0, 20, 16)), f"{NAME}: num_kv_heads must be at least 1, got 0"),
    Bad("heads", wrong(**both(2, 3, 20, 16)), f"{NAME}: num_q_heads must be a multiple of num_kv_heads (3), got 8"),
    Bad("no_q_heads", wrong(q=full(2, 0, 3, 16)), f"{NAME}: num_q_heads must be a multiple of num_kv_heads (2), got 0"),
    Bad(
        "stride_q",
        wrong(q=apart(2, 8, 3, 16)),
        f"{NAME}: q must be contiguous in the last dimension, got a last stride of 3",
    ),
    Bad(
        "stride_k",
        wrong(k=apart(2, 2, 20, 16)),
        f"{NAME}: k must be contiguous in the last dimension, got a last stride of 20",
    ),
    Bad(
        "stride_v",
        wrong(v=apart(2, 2, 20, 16)),
        f"{NAME}: v must be contiguous in the last dimension, got a last stride of 20",
    ),
    Bad(
        "lengths",
        wrong(lengths=full(3, dtype=torch.int32)),
        f"{NAME}: lengths must be [batch] (2), [batch, 1] or [batch, num_kv_heads] (2), got 1D [3]",
    ),
    Bad(
        "lengths_heads",
        wrong(lengths=full(2, 8, dtype=torch.int32)),
        f"{NAME}: lengths must be [batch] (2), [batch, 1] or [batch, num_kv_heads] (2), got 2D [2, 8]",
    ),
    Bad("lengths_dtype", wrong(lengths=full(2, dtype=torch.int64)), f"{NAME}: lengths must be int32, got int64"),
    Bad("scale", wrong(softmax_scale=0.0), f"{NAME}: softmax_scale must be finite and above 0, got 0.000000"),
    Bad("scale_nan", wrong(softmax_scale=NAN), f"{NAME}: softmax_scale must be finite and above 0, got nan"),
    Bad(
        "length",
        wrong(lengths=lambda d: int32([3, 21], d)),
        f"{NAME}: lengths must be from 0 to the capacity (20), got 21 at [1]",
        reads_data=True,
    ),
]
