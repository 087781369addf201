"""append_ against row-by-row copies, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import store as reference
from tests.store.test_compact import DTYPES, fill, full, several


def check(buffers, rows, slots):
    expected = reference.append([t.cpu() for t in buffers], [t.cpu() for t in rows], slots.cpu())
    kvcompress.append_(buffers, rows, slots)
    for t, e in zip(buffers, expected):
        assert torch.equal(t.cpu(), e)


def any_slots(batch, n, capacity, device, padded=True):
    """Distinct slots in any order; some -1."""
    slots = torch.rand(batch, capacity).argsort(-1)[:, :n].int()
    return (torch.where(torch.rand(batch, n) < 0.3, -1, slots) if padded else slots).int().to(device)


def layer(batch, heads, capacity, n, head_dim, device, dtype=torch.bfloat16):
    """K, V and positions, and new rows of each."""
    buffers = [fill((batch, heads, capacity, head_dim), dtype, device) for _ in range(2)] + [
        fill((batch, heads, capacity), torch.int32, device)
    ]
    rows = [fill((batch, heads, n, head_dim), dtype, device) for _ in range(2)] + [
        fill((batch, heads, n), torch.int32, device)
    ]
    return buffers, rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 33, 80, 128])
@pytest.mark.parametrize("n", [1, 9])
def test_dtypes(dtype, head_dim, n, device):
    check(*layer(2, 3, 40, n, head_dim, device, dtype), any_slots(2, n, 40, device))


@pytest.mark.parametrize(
    ("batch", "heads", "capacity", "n"),
    [(1, 1, 1, 1), (1, 8, 100, 1), (64, 8, 20, 1), (1, 2, 3000, 2048), (3, 5, 300, 300)],
)
def test_sizes(batch, heads, capacity, n, device):
    check(*layer(batch, heads, capacity, n, 64, device), any_slots(batch, n, capacity, device, padded=False))
    check(*layer(batch, heads, capacity, n, 24, device), any_slots(batch, n, capacity, device))


def test_padding_alone(device):
    buffers, rows = layer(2, 2, 8, 3, 16, device)
    before = [t.clone() for t in buffers]
    kvcompress.append_(buffers, rows, torch.full((2, 3), -1, dtype=torch.int32, device=device))
    assert all(torch.equal(x, y) for x, y in zip(buffers, before))


def test_strided_views(device):
    base = fill((2, 50, 3, 64), torch.bfloat16, device)
    packed = fill((2, 3, 50, 2, 40), torch.float16, device)
    odd = fill((2 * 3 * 50 * 9 + 1,), torch.uint8, device)[1:].view(2, 3, 50, 9)
    buffers = [base.transpose(1, 2), packed[..., 1, :], odd, fill((2, 3, 50), torch.int32, device)]
    rows = [
        fill((2, 7, 3, 64), torch.bfloat16, device).transpose(1, 2),
        cases.strided(fill((2, 3, 7, 40), torch.float16, device)),
        fill((2, 3, 7, 9), torch.uint8, device),
        fill((2, 1, 7), torch.int32, device).expand(2, 3, 7),  # one row of positions for all heads
    ]
    check(buffers, rows, any_slots(2, 14, 50, device)[:, ::2].contiguous())


def test_64_bit_offsets(device):
    buffer = cases.far_apart((2, 2, 50, 16), torch.uint8, device, 2**31 + 64)
    buffer.zero_()
    rows = fill((2, 2, 3, 16), torch.uint8, device)
    slots = any_slots(2, 3, 50, device)
    expected = reference.append([buffer.contiguous()], [rows], slots)[0]
    kvcompress.append_([buffer], [rows], slots)
    assert torch.equal(buffer.contiguous(), expected)


def test_other_heads(device):
    """Each pair has its own number of heads."""
    buffers = [fill((2, 4, 20, 8), torch.float32, device), fill((2, 1, 20), torch.int32, device)]
    rows = [fill((2, 4, 3, 8), torch.float32, device), fill((2, 1, 3), torch.int32, device)]
    check(buffers, rows, any_slots(2, 3, 20, device))


def test_token_by_token(device):
    """A prompt written token by token equals the prompt."""
    keys = fill((2, 3, 20, 32), torch.bfloat16, device)
    buffer = torch.zeros_like(keys)
    for t in range(20):
        kvcompress.append_([buffer], [keys[:, :, t : t + 1]], torch.full((2, 1), t, dtype=torch.int32, device=device))
    assert torch.equal(buffer, keys)


def test_bitwise_run_to_run(device):
    buffers, rows = layer(2, 4, 100, 40, 64, device)
    slots = any_slots(2, 40, 100, device)
    runs = [[t.clone() for t in buffers] for _ in range(5)]
    for run in runs:
        kvcompress.append_(run, rows, slots)
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0]))


def test_empty(device):
    for shape, n in [((0, 2, 8, 4), 1), ((2, 0, 8, 4), 1), ((2, 3, 8, 0), 1), ((2, 3, 8, 4), 0), ((2, 3, 0, 4), 0)]:
        rows = torch.empty(*shape[:2], n, shape[3], device=device)
        kvcompress.append_(
            [torch.empty(shape, device=device)], [rows], torch.zeros(shape[0], n, dtype=torch.int32, device=device)
        )


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_fuzz(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    capacity = data.draw(st.integers(1, 40))
    n = data.draw(st.integers(0, capacity))
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    buffers, rows = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        dtype, head_dim = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 40))
        tail = (head_dim,) if head_dim else ()
        buffer = fill((batch, heads, capacity, *tail), dtype)
        buffers.append(cases.strided(buffer) if head_dim and data.draw(st.booleans()) else buffer)
        rows.append(fill((batch, heads, n, *tail), dtype))
    check(buffers, rows, any_slots(batch, n, capacity, "cpu"))


def samples(device):
    buffers, rows = layer(2, 3, 12, 4, 16, device)
    slots = any_slots(2, 4, 12, device)
    return [(buffers, rows, slots), (buffers[:1], rows[:1], slots)]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "buffers": [torch.randn(2, 3, 6, 4, device=device), torch.randn(2, 3, 6, device=device)],
            "rows": [torch.randn(2, 3, 2, 4, device=device), torch.randn(2, 3, 2, device=device)],
            "slots": torch.tensor([[0, 1], [4, 5]], dtype=torch.int32, device=device),
        }
        good.update({name: change(device) for name, change in changes.items()})
        return tuple(good.values())

    return args


def slots(*values):
    return lambda device: torch.tensor(values, dtype=torch.int32, device=device).view(2, -1)


NAME = "append_"
RULE = f"{NAME}: slots must be -1 or in [0, capacity), none twice in a row"
BAD = [
    Bad("slots_rank", wrong(slots=full(2, dtype=torch.int32)), f"{NAME}: slots must be [batch, n], got 1D [2]"),
    Bad("slots_dtype", wrong(slots=full(2, 2, dtype=torch.int64)), f"{NAME}: slots must be int32, got int64"),
    Bad("no_buffers", wrong(buffers=several()), f"{NAME}: buffers must be 1 to 8 tensors, got 0"),
    Bad("nine_buffers", wrong(buffers=several(*[full(2, 3, 6)] * 9)), f"{NAME}: buffers must be 1 to 8 tensors, got 9"),
    Bad("no_rows", wrong(rows=several()), f"{NAME}: rows must be 1 to 8 tensors, got 0"),
    Bad(
        "fewer_rows",
        wrong(rows=several(full(2, 3, 2, 4))),
        f"{NAME}: rows must be as many tensors as buffers (2), got 1",
    ),
    Bad(
        "rank",
        wrong(buffers=several(full(3, 6), full(2, 3, 6))),
        f"{NAME}: buffers must be [batch, heads, capacity, head_dim] or [batch, heads, capacity], got 2D [3, 6] at [0]",
    ),
    Bad(
        "dtype",
        wrong(rows=several(full(2, 3, 2, 4, dtype=torch.float16), full(2, 3, 2))),
        f"{NAME}: rows must be of the dtype of buffers (float32), got float16",
    ),
    Bad(
        "capacity",
        wrong(buffers=several(full(2, 3, 6, 4), full(2, 3, 7))),
        f"{NAME}: buffers must be of the batch of slots (2) and the capacity of buffers[0] (6), got [2, 3, 7] at [1]",
    ),
    Bad(
        "n",
        wrong(rows=several(full(2, 3, 3, 4), full(2, 3, 2))),
        f"{NAME}: rows must be of the shape of buffers [2, 3, 6, 4] with n (2) for the capacity, got [2, 3, 3, 4] at [0]",
    ),
    Bad(
        "head_dim",
        wrong(rows=several(full(2, 3, 2, 5), full(2, 3, 2))),
        f"{NAME}: rows must be of the shape of buffers [2, 3, 6, 4] with n (2) for the capacity, got [2, 3, 2, 5] at [0]",
    ),
    Bad(
        "stride",
        wrong(buffers=several(lambda d: torch.ones(2, 3, 4, 6, device=d).mT, full(2, 3, 6))),
        f"{NAME}: buffers must be contiguous in the last dimension, got a last stride of 6 at [0]",
    ),
    Bad(
        "overlap",
        wrong(buffers=several(full(2, 3, 6, 4), lambda d: torch.ones(2, 1, 6, device=d).expand(2, 3, 6))),
        f"{NAME}: buffers must be free of overlapping rows, got a stride of 0 in dimension 1 at [1]",
    ),
    Bad("range", wrong(slots=slots(0, 1, 6, 2)), f"{RULE}, got 6 at [1, 0]", reads_data=True),
    Bad("negative", wrong(slots=slots(0, -3, 1, 2)), f"{RULE}, got -3 at [0, 1]", reads_data=True),
    Bad("twice", wrong(slots=slots(0, 1, 3, 3)), f"{RULE}, got 3 at [1, 1]", reads_data=True),
]
