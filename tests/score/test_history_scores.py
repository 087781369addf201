"""history_scores against a masked softmax in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import score as reference
from tests.store.test_compact import full

INF = float("inf")


def make(batch, heads, capacity, width, device="cpu", *, units=None, held=None, spread=3.0):
    """History with some queries that are not there and entries that old queries have not seen; slots in no order."""
    units = heads if units is None else units
    history = torch.randn(batch, heads, capacity, width, device=device) * spread
    history[..., width // 2 :: 5] = -INF
    history[..., capacity // 3 :, 1::4] = -INF
    positions = torch.rand(batch, units, capacity).argsort(-1).int().to(device)
    held = [capacity] * batch if held is None else held
    lengths = torch.tensor(held, dtype=torch.int32, device=device)[:, None].repeat(1, units)
    for b, count in enumerate(held):
        history[b, :, count:] = float("nan")  # room is never read
    return history, positions, lengths, torch.full_like(lengths, capacity)


def check(*args, **options):
    got = kvcompress.history_scores(*args, **options)
    expected = reference.history_scores(*args, **options)
    plain = reference.history_scores(*args, dtype=torch.float32, **options)
    error, allowed = (got - expected).abs().max(), (plain - expected).abs().max()
    assert error <= 2 * allowed + 1e-7 * expected.abs().max(), (error, allowed)
    assert ((expected == 0) <= (got == 0)).all()
    return got


@pytest.mark.parametrize("fuse", ["sum", "max"])
@pytest.mark.parametrize("width", [1, 3, 31, 32, 33, 200, 1024])
@pytest.mark.parametrize("capacity", [1, 15, 16, 17, 130, 1025])
def test_sizes(capacity, width, fuse, device):
    check(*make(2, 2, capacity, width, device), window=capacity // 4, fuse=fuse)


@pytest.mark.parametrize("fuse", ["sum", "max"])
def test_lengths_units_and_heads(fuse, device):
    check(*make(3, 8, 90, 32, device, units=2, held=[90, 0, 41]), window=7, fuse=fuse)
    check(*make(2, 4, 90, 6, device, units=1), fuse=fuse)
    check(*make(40, 8, 90, 6, device, units=8), fuse=fuse)  # more heads than the GPU has room for clusters


def test_large_logits(device):
    check(*make(1, 2, 300, 9, device, spread=300.0), fuse="sum")


def test_a_query_that_is_not_there_counts_nothing(device):
    history, *rest = make(1, 1, 20, 3, device)
    history[...] = -INF
    history[0, 0, :, 1] = 0.0
    got = check(history, *rest)
    assert torch.equal(got, torch.full_like(got, 1 / 20))
    history[...] = -INF
    assert (kvcompress.history_scores(history, *rest) == 0).all()


def test_all_in_the_window(device):
    assert (kvcompress.history_scores(*make(1, 2, 20, 3, device), window=20) == 0).all()


def test_strided_views(device):
    history, *rest = make(2, 3, 50, 8, device)
    expected = kvcompress.history_scores(history, *rest)
    assert torch.equal(kvcompress.history_scores(cases.strided(history), *rest), expected)


def test_bitwise_run_to_run(device):
    args = make(2, 4, 3000, 32, device)
    first = kvcompress.history_scores(*args)
    assert all(torch.equal(kvcompress.history_scores(*args), first) for _ in range(4))


def test_empty(device):
    for batch, heads, capacity in [(0, 2, 5), (2, 0, 5), (2, 2, 0)]:
        ints = [torch.zeros(batch, heads, *rest, dtype=torch.int32, device=device) for rest in ((capacity,), (), ())]
        got = kvcompress.history_scores(torch.zeros(batch, heads, capacity, 3, device=device), *ints)
        assert got.shape == (batch, heads, capacity)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    units=st.integers(1, 3),
    each=st.integers(1, 3),
    capacity=st.integers(1, 60),
    width=st.integers(1, 40),
    window=st.integers(0, 30),
    fuse=st.sampled_from(["sum", "max"]),
    seed=st.integers(0, 9999),
)
def test_fuzz(batch, units, each, capacity, width, window, fuse, seed):
    torch.manual_seed(seed)
    held = torch.randint(0, capacity + 1, (batch,)).tolist()
    check(*make(batch, units * each, capacity, width, units=units, held=held), window=window, fuse=fuse)


def samples(device):
    return [(*make(2, 4, 12, 3, device, units=2), 2, 0), (*make(1, 2, 12, 5, device), 0, 1)]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        history, positions, lengths, seen = make(2, 4, 6, 3, device, units=2)
        good = {
            "history": history,
            "positions": positions,
            "lengths": lengths,
            "seen": seen,
            "window": 1,
            "fuse": 0,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def ints(*shape):
    return full(*shape, dtype=torch.int32)


NAME = "history_scores"
FIT = "of the batch (2) and capacity (6) of history and of units that divide its heads (4)"
BAD = [
    Bad(
        "rank",
        wrong(history=full(4, 6, 3)),
        f"{NAME}: history must be [batch, heads, capacity, width], got 3D [4, 6, 3]",
    ),
    Bad(
        "rank_positions",
        wrong(positions=ints(4, 6)),
        f"{NAME}: positions must be [batch, units, capacity], got 2D [4, 6]",
    ),
    Bad("dtype", wrong(history=ints(2, 4, 6, 3)), f"{NAME}: history must be float32, got int32"),
    Bad("positions_dtype", wrong(positions=full(2, 2, 6)), f"{NAME}: positions must be int32, got float32"),
    Bad("units", wrong(positions=ints(2, 3, 6)), f"{NAME}: positions must be {FIT}, got [2, 3, 6]"),
    Bad("capacity", wrong(positions=ints(2, 2, 7)), f"{NAME}: positions must be {FIT}, got [2, 2, 7]"),
    Bad("width", wrong(history=full(2, 4, 6, 1025)), f"{NAME}: width must be from 1 to 1024, got 1025"),
    Bad("lengths", wrong(lengths=ints(2, 4)), f"{NAME}: lengths must be [batch, units] [2, 2], got 2D [2, 4]"),
    Bad("seen_dtype", wrong(seen=full(2, 2)), f"{NAME}: seen must be int32, got float32"),
    Bad("window", wrong(window=-1), f"{NAME}: window must be at least 0, got -1"),
    Bad("fuse", wrong(fuse=2), f"{NAME}: fuse must be 0 (sum) or 1 (max), got 2"),
]
