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


def packed(index, room, gaps=True):
    """A padded index packed, `room` free slots behind each head: index, indptr, row_start and the total.

    With `gaps`, every other head keeps one -1 at its end.
    """
    counts = (index >= 0).sum(-1).flatten()
    stretch = counts + room
    parts = [row[: n + (gaps and at % 2 and n < index.shape[2])] for at, (row, n) in enumerate(
        zip(index.flatten(0, 1), counts.tolist()))]  # fmt: skip
    indptr = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).int()
    row_start = (stretch.cumsum(0) - stretch).to(index.device)
    return torch.cat(parts), indptr.to(index.device), row_start, int(stretch.sum())


def check(tensors, index, room=0):
    *arrays, total = packed(index, room)
    out = kvcompress.gather_ragged(tensors, *arrays, total=total)
    expected = reference.gather_ragged([t.cpu() for t in tensors], *(t.cpu() for t in arrays), total)
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
    for room in (2, 0):
        *arrays, total = packed(index, room)
        (out,) = kvcompress.gather_ragged([fill((2, 3, 9, 8), torch.float32, device)], *arrays, total=total)
        assert out.shape == (6 * room, 8)
        assert not out.any()


def test_from_topk_ragged(device):
    """The packed index of topk_ragged goes in as it is, heads that keep nothing and slots too many included."""
    scores = torch.randn(2, 4, 50, device=device)
    counts = torch.tensor([[3, 0, 50, 7], [0, 1, 20, 0]], dtype=torch.int32, device=device)
    keys = fill((2, 4, 50, 16), torch.bfloat16, device)
    for spare in (0, 5):
        index, indptr = kvcompress.topk_ragged(scores, counts, total=81 + spare)
        (out,) = kvcompress.gather_ragged([keys], index, indptr, indptr[:-1].long(), total=81)
        expected = [
            keys[b, h, scores[b, h].topk(n).indices.sort().values]
            for b, row in enumerate(counts.tolist())
            for h, n in enumerate(row)
        ]
        assert torch.equal(out, torch.cat(expected))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_fuzz(data):
    batch, heads, groups = (data.draw(st.integers(1, 3)) for _ in range(3))
    seq_len, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30))
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    tensors = [fill((batch, heads, seq_len, data.draw(st.integers(1, 40))), data.draw(st.sampled_from(DTYPES)))]
    check(tensors, uneven(batch, heads * groups, k, seq_len, "cpu"), data.draw(st.integers(0, 9)))


def samples(device):
    tensors = [fill((2, 3, 30, 16), torch.bfloat16, device), fill((2, 6, 30), torch.float32, device)]
    return [(tensors, *packed(uneven(2, 6, 12, 30, device), 4))]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "tensors": [torch.randn(2, 3, 6, 4, device=device)],
            "index": torch.arange(5, dtype=torch.int32, device=device).repeat(6),
            "indptr": torch.arange(0, 31, 5, dtype=torch.int32, device=device),
            "row_start": torch.arange(6, device=device) * 5,
            "total": 30,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


NAME = "gather_ragged"
BAD = [
    Bad("no_tensors", wrong(tensors=several()), f"{NAME}: tensors must be 1 to 8 tensors, got 0"),
    Bad("rank", wrong(index=full(2, 3, 5, dtype=torch.int32)), f"{NAME}: index must be [entries], got 3D"),
    Bad("index_dtype", wrong(index=full(30, dtype=torch.int64)), f"{NAME}: index must be int32, got int64"),
    Bad(
        "batch",
        wrong(tensors=several(full(2, 3, 6, 4), full(1, 3, 6, 4))),
        f"{NAME}: tensors must be of the batch (2) and seq_len (6) of tensors[0], got [1, 3, 6, 4] at [1]",
    ),
    Bad(
        "indptr",
        wrong(indptr=full(8, dtype=torch.int32)),
        f"{NAME}: indptr must be [batch * heads + 1] for a batch of 2, got 1D [8]",
    ),
    Bad("indptr_dtype", wrong(indptr=full(7, dtype=torch.int64)), f"{NAME}: indptr must be int32, got int64"),
    Bad(
        "heads",
        wrong(indptr=full(9, dtype=torch.int32), row_start=full(8, dtype=torch.int64)),
        f"{NAME}: indptr must be of a multiple of 3 heads, got 4 at [0]",
    ),
    Bad(
        "row_start",
        wrong(row_start=full(7, dtype=torch.int64)),
        f"{NAME}: row_start must be [batch * heads] (6), got 1D [7]",
    ),
    Bad("row_start_dtype", wrong(row_start=full(6, dtype=torch.int32)), f"{NAME}: row_start must be int64, got int32"),
    Bad("total", wrong(total=-1), f"{NAME}: total must be at least 0, got -1"),
]
