"""gather_ragged against row-by-row copies, exactly. What it shares with gather is tested there."""

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


def starts(index, room):
    """Heads one after the other, `room` free slots behind each: row_start and the total."""
    counts = (index >= 0).sum(-1).flatten() + room
    return (counts.cumsum(0) - counts).to(index.device), int(counts.sum())


def check(tensors, index, room=0):
    row_start, total = starts(index, room)
    out = kvcompress.gather_ragged(tensors, index, row_start, total=total)
    expected = reference.gather_ragged([t.cpu() for t in tensors], index.cpu(), row_start, total)
    for o, e in zip(out, expected):
        assert o.is_contiguous()
        assert torch.equal(o.cpu(), e)


def uneven(batch, heads, k, seq_len, device):
    """Ascending, with a count of its own for every head."""
    index = torch.full((batch, heads, k), -1, dtype=torch.int32)
    for row in index.view(-1, k):
        n = int(torch.randint(0, min(k, seq_len) + 1, ()))
        row[:n] = torch.randperm(seq_len)[:n].sort().values.int()
    return index.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 64, 80])
def test_dtypes(dtype, head_dim, device):
    tensors = [fill((2, 3, 40, head_dim), dtype, device), fill((2, 3, 40), dtype, device)]
    check(tensors, uneven(2, 3, 30, 40, device), room=5)


@pytest.mark.parametrize(("seq_len", "k", "room"), [(1, 1, 0), (5, 3, 2), (3000, 1024, 128), (4000, 2500, 1)])
def test_sizes(seq_len, k, room, device):
    tensors = [fill((1, 4, seq_len, 64), torch.bfloat16, device), fill((1, 4, seq_len), torch.int32, device)]
    check(tensors, uneven(1, 4, k, seq_len, device), room)


def test_query_heads_and_strides(device):
    base = fill((2, 90, 2, 64), torch.bfloat16, device).transpose(1, 2)
    check([base, cases.strided(fill((2, 2, 90, 20), torch.float32, device))], uneven(2, 8, 33, 90, device), room=3)


def test_empty(device):
    index = torch.full((2, 3, 4), -1, dtype=torch.int32, device=device)
    (out,) = kvcompress.gather_ragged([fill((2, 3, 9, 8), torch.float32, device)], index, starts(index, 2)[0], total=12)
    assert not out.any()
    (out,) = kvcompress.gather_ragged([fill((2, 3, 9, 8), torch.float32, device)], index, starts(index, 0)[0], total=0)
    assert out.shape == (0, 8)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_fuzz(data):
    batch, heads, groups = (data.draw(st.integers(1, 3)) for _ in range(3))
    seq_len, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30))
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    tensors = [fill((batch, heads, seq_len, data.draw(st.integers(1, 40))), data.draw(st.sampled_from(DTYPES)))]
    check(tensors, uneven(batch, heads * groups, k, seq_len, "cpu"), data.draw(st.integers(0, 9)))


def samples(device):
    index = uneven(2, 6, 12, 30, device)
    row_start, total = starts(index, 4)
    return [
        (
            [fill((2, 3, 30, 16), torch.bfloat16, device), fill((2, 6, 30), torch.float32, device)],
            index,
            row_start,
            total,
        )
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "tensors": [torch.randn(2, 3, 6, 4, device=device)],
            "index": torch.arange(5, dtype=torch.int32, device=device).expand(2, 3, 5),
            "row_start": torch.arange(6, device=device) * 5,
            "total": 30,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


NAME = "gather_ragged"
BAD = [
    Bad("no_tensors", wrong(tensors=several()), f"{NAME}: tensors must be 1 to 8 tensors, got 0"),
    Bad("batch", wrong(tensors=several(full(1, 3, 6, 4))), f"{NAME}: tensors must be of the batch of index (2)"),
    Bad("index_dtype", wrong(index=full(2, 3, 5, dtype=torch.int64)), f"{NAME}: index must be int32, got int64"),
    Bad(
        "index_heads", wrong(index=full(2, 4, 5, dtype=torch.int32)), f"{NAME}: index must be of a multiple of 3 heads"
    ),
    Bad(
        "row_start",
        wrong(row_start=full(7, dtype=torch.int64)),
        f"{NAME}: row_start must be [batch * heads] (6), got 1D [7]",
    ),
    Bad("row_start_dtype", wrong(row_start=full(6, dtype=torch.int32)), f"{NAME}: row_start must be int64, got int32"),
    Bad("total", wrong(total=-1), f"{NAME}: total must be at least 0, got -1"),
]
