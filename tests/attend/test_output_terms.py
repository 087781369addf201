"""output_terms_ against float64, and against what it stands for: the change of the output without an entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.attend.test_decode_attention import full, int32, make
from tests.bad_inputs import Bad
from tests.reference import attend as reference

NAN = float("nan")
SETS = [("value",), ("key",), ("value", "key"), ("value", "key", "cross")]


def check(q, k, v, *, lengths=None, **how):
    out, lse, logits = kvcompress.decode_attention(q, k, v, lengths=lengths, return_logits=True)
    if lengths is not None:  # what lies behind the entries is never read
        behind = torch.arange(v.shape[2], device=v.device) >= lengths[:, None]
        v = v.masked_fill(behind[:, None, :, None], 0)
    sums = torch.rand(v.shape[:3], device=v.device)
    args = (sums, out, v, logits, lse)
    expected = reference.output_terms(*args, lengths=lengths, **how)
    plain = reference.output_terms(*args, lengths=lengths, dtype=torch.float32, **how)
    kvcompress.output_terms_(*args, lengths=lengths, **how)
    error, allowed = (sums - expected).abs().max(), (plain - expected).abs().max()
    # exp of a logit of size s carries s times the rounding of its argument; |v|^2 + |O|^2 - 2 O.v that of its parts
    shares = (logits.double() - lse.double()[..., None]).exp().nan_to_num(0)
    logit = logits.double().nan_to_num(0, neginf=0).abs()
    lengths_of = [t.double().norm(dim=-1) for t in (v.repeat_interleave(q.shape[1] // k.shape[1], 1), out)]
    parts = (lengths_of[0][:, :, None] + lengths_of[1][..., None]).square() * (shares * (1 + logit)).square()
    steps = 4 * (1 + logit.max()) * torch.finfo(torch.float32).eps
    most = max(parts.unflatten(1, (k.shape[1], -1)).sum((2, 3)).max(), expected.abs().max())
    assert error <= 2 * allowed + steps * most, (error, allowed)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("q_per_kv", [1, 4, 8])
def test_against_float64(dtype, head_dim, q_per_kv, device):
    check(*make(2, 2 * q_per_kv, 2, 2, 150, head_dim, dtype, device), lengths=int32([150, 41], device))


@pytest.mark.parametrize("terms", SETS)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_how(terms, decay, device):
    check(*make(2, 12, 3, 4, 70, 64, torch.bfloat16, device), terms=terms, decay=decay)


@pytest.mark.parametrize("capacity", [1, 7, 64, 65, 1000])
def test_sizes(capacity, device):
    check(*make(1, 8, 2, 1, capacity, 64, torch.float16, device))


def test_value_is_the_change_of_the_output(device):
    """Without value j the output moves by A v: the value term is its squared length."""
    q, k, v = make(1, 4, 2, 1, 20, 16, device=device)
    out, lse, logits = kvcompress.decode_attention(q, k, v, return_logits=True)
    sums = torch.zeros(1, 2, 20, device=device)
    kvcompress.output_terms_(sums, out, v, logits, lse, terms=("value",))
    for j in (0, 7, 19):
        without = v.clone()
        without[:, :, j] = 0
        change = kvcompress.decode_attention(q, k, without)[0] - out
        moved = change.square().sum((2, 3)).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(sums[..., j], moved, rtol=1e-3, atol=1e-6)


def test_equals_weighted_squares(device):
    """The value term is what the attention itself keeps, given the squared norms as weights."""
    q, k, v = make(2, 8, 2, 2, 90, 64, device=device)
    terms, squares = torch.zeros(2, 2, 90, device=device), torch.zeros(2, 2, 90, device=device)
    kvcompress.observed_decode_attention_(
        q, k, v, sums=squares, weights=v.square().sum(-1), power=2, group_reduce="sum"
    )
    out, lse, logits = kvcompress.decode_attention(q, k, v, return_logits=True)
    kvcompress.output_terms_(terms, out, v, logits, lse, terms=("value",))
    torch.testing.assert_close(terms, squares, rtol=1e-4, atol=1e-6)


def test_overwriting_reads_nothing(device):
    q, k, v = make(1, 4, 2, 1, 30, 64, device=device)
    out, lse, logits = kvcompress.decode_attention(q, k, v, return_logits=True)
    sums = torch.full((1, 2, 30), NAN, device=device)
    kvcompress.output_terms_(sums, out, v, logits, lse, decay=0.0)
    assert sums.isfinite().all()


def test_bitwise_run_to_run(device):
    q, k, v = make(2, 8, 2, 2, 500, 128, torch.bfloat16, device)
    out, lse, logits = kvcompress.decode_attention(q, k, v, return_logits=True)
    runs = [torch.ones(2, 2, 500, device=device) for _ in range(3)]
    for sums in runs:
        kvcompress.output_terms_(sums, out, v, logits, lse, decay=0.9)
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_empty(device):
    for batch, capacity in [(0, 5), (2, 0)]:
        q, k, v = make(batch, 4, 2, 1, capacity, 64, device=device)
        out, lse, logits = kvcompress.decode_attention(q, k, v, return_logits=True)
        kvcompress.output_terms_(torch.zeros(batch, 2, capacity, device=device), out, v, logits, lse)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    q_per_kv=st.integers(1, 8),
    num_queries=st.integers(1, 8),
    capacity=st.integers(1, 80),
    head_dim=st.integers(1, 8).map(lambda n: 8 * n),
    terms=st.sampled_from(SETS),
    decay=st.sampled_from([0.0, 0.9, 1.0]),
    seed=st.integers(0, 9999),
)
def test_fuzz(batch, heads, q_per_kv, num_queries, capacity, head_dim, terms, decay, seed):
    torch.manual_seed(seed)
    lengths = torch.randint(0, capacity + 1, (batch,), dtype=torch.int32)
    lengths[0] = capacity
    q, k, v = make(batch, heads * q_per_kv, heads, num_queries, capacity, head_dim)
    check(q, k, v, lengths=lengths, terms=terms, decay=decay)


def samples(device):
    q, k, v = make(2, 8, 2, 3, 40, 24, torch.bfloat16, device)
    lengths = int32([40, 7], device)
    out, lse, logits = kvcompress.decode_attention(q, k, v, lengths=lengths, return_logits=True)
    sums = torch.rand(2, 2, 40, device=device)
    return [(sums, out, v, logits, lse, lengths, 0.5, 7), (sums, out, v, logits, lse, None, 1.0, 1)]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "sums": torch.ones(2, 2, 20, device=device),
            "out": torch.ones(2, 8, 3, 16, device=device),
            "v": torch.ones(2, 2, 20, 16, device=device),
            "logits": torch.ones(2, 8, 3, 20, device=device),
            "lse": torch.ones(2, 8, 3, device=device),
            "lengths": int32([20, 5], device),
            "decay": 1.0,
            "terms": 7,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


NAME = "output_terms_"
OUT = "of the batch, heads and queries of out [2, 8, 3, 16]"
BAD = [
    Bad(
        "rank_v",
        wrong(v=full(2, 20, 16)),
        f"{NAME}: v must be [batch, num_kv_heads, capacity, head_dim], got 3D [2, 20, 16]",
    ),
    Bad(
        "dtype",
        wrong(v=full(2, 2, 20, 16, dtype=torch.float16)),
        f"{NAME}: v must be of the dtype of out (float32), got float16",
    ),
    Bad("sums_dtype", wrong(sums=full(2, 2, 20, dtype=torch.float16)), f"{NAME}: sums must be float32, got float16"),
    Bad(
        "sums",
        wrong(sums=full(2, 8, 20)),
        f"{NAME}: sums must be of the batch, heads and capacity of v [2, 2, 20, 16], got [2, 8, 20]",
    ),
    Bad(
        "head_dim",
        wrong(v=full(2, 2, 20, 24)),
        f"{NAME}: v must be of the batch (2) and head_dim (16) of out, got [2, 2, 20, 24]",
    ),
    Bad("heads", wrong(v=full(2, 3, 20, 16)), f"{NAME}: num_q_heads must be a multiple of num_kv_heads (3), got 8"),
    Bad(
        "logits",
        wrong(logits=full(2, 8, 3, 21)),
        f"{NAME}: logits must be {OUT} and the capacity of v (20), got [2, 8, 3, 21]",
    ),
    Bad("lse", wrong(lse=full(2, 8, 2)), f"{NAME}: lse must be {OUT}, got [2, 8, 2]"),
    Bad("lengths", wrong(lengths=full(3, dtype=torch.int32)), f"{NAME}: lengths must be [batch] (2), got 1D [3]"),
    Bad("decay", wrong(decay=1.5), f"{NAME}: decay must be from 0 to 1, got 1.500000"),
    Bad("terms", wrong(terms=8), f"{NAME}: terms must be a sum of 1 (value), 2 (key) and 4 (cross), got 8"),
    Bad(
        "contiguous",
        wrong(out=lambda d: torch.ones(2, 8, 16, 3, device=d).mT),
        f"{NAME}: out must be contiguous, got strides of its own",
    ),
]
