"""compact_ragged_ against row-by-row copies, exactly. What it shares with compact_ is tested there."""

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


def check(tensors, index, indptr, row_start):
    expected = reference.compact_ragged([t.cpu() for t in tensors], index.cpu(), indptr.cpu(), row_start.cpu())
    kvcompress.compact_ragged_(tensors, index, indptr, row_start)
    for t, e in zip(tensors, expected):
        assert torch.equal(t.cpu(), e)


def stretches(lengths, device, *, room=3, padded=False):
    """Heads of `lengths` entries, `room` slots behind each, of which each keeps some at random: index, indptr, row_start
    and the slots in all. If `padded`, every head's part holds -1 at its end.
    """
    parts, starts, slot = [], [], 1  # a slot that is nobody's in front
    for length in lengths:
        kept = torch.randperm(length)[: int(torch.randint(0, length + 1, ()))].sort().values
        parts.append(torch.cat([kept, torch.full((int(torch.randint(0, 4, ())) if padded else 0,), -1)]))
        starts.append(slot)
        slot += length + room
    indptr = torch.tensor([0, *map(len, parts)]).cumsum(0)
    index = torch.cat(parts) if parts else torch.empty(0)
    return index.int().to(device), indptr.int().to(device), torch.tensor(starts, dtype=torch.int64, device=device), slot


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 64, 80])
def test_dtypes(dtype, head_dim, device):
    *where, slots = stretches([40, 0, 17, 90, 1, 33], device, padded=True)
    check([fill((slots, head_dim), dtype, device), fill((slots,), dtype, device)], *where)


@pytest.mark.parametrize(
    "lengths",
    [[1], [0, 0], [3000], [9000, 3, 700, 0, 20, 5000, 1, 64], [64] * 300, [20_000, 1, 1, 1], [1, 1, 1, 20_000]],
)
def test_sizes(lengths, device):
    for padded in (False, True):
        *where, slots = stretches(lengths, device, room=5, padded=padded)
        tensors = [fill((slots, 64), torch.bfloat16, device), fill((slots, 24), torch.bfloat16, device)]
        check([*tensors, fill((slots,), torch.int32, device)], *where)


def test_strided_views(device):
    *where, slots = stretches([500, 40, 2700], device)
    side_by_side = fill((slots, 2, 40), torch.float16, device)  # K and V
    every_other = fill((2 * slots, 20), torch.float32, device)[::2]
    odd = fill((slots * 9 + 1,), torch.uint8, device)[1:].view(slots, 9)
    check([side_by_side[:, 0], side_by_side[:, 1], every_other, odd], *where)


def test_others_stay(device):
    """A head moves its own rows only; its room, its dropped rows and the other heads keep what they held."""
    t = torch.arange(10.0, device=device)
    index = torch.tensor([2, -1, 1, 2], dtype=torch.int32, device=device)
    indptr = torch.tensor([0, 2, 2, 4], dtype=torch.int32, device=device)
    kvcompress.compact_ragged_([t], index, indptr, torch.tensor([0, 3, 6], device=device))
    assert t.tolist() == [2, 1, 2, 3, 4, 5, 7, 8, 8, 9]


def test_after_topk_ragged(device):
    """A packed store, cut to what topk_ragged keeps of each head."""
    length, room = 900, 7
    scores = torch.randn(2, 4, length, device=device)
    counts = torch.tensor([[1, 300, 0, 17], [900, 2, 64, 5]], dtype=torch.int32, device=device)
    index, indptr = kvcompress.topk_ragged(scores, counts, total=int(counts.sum()))
    packed = torch.nn.functional.pad(scores.view(8, length), (0, room)).flatten()
    row_start = torch.arange(8, device=device) * (length + room)
    kvcompress.compact_ragged_([packed], index, indptr, row_start)
    for head, (first, last) in enumerate(zip(indptr.tolist(), indptr.tolist()[1:])):
        start = int(row_start[head])
        assert torch.equal(packed[start : start + last - first], scores.view(8, -1)[head, index[first:last].long()])


def test_padded_index(device):
    """The [batch, heads, k] index of topk: parts of equal size with -1 at their ends."""
    index = cases.kept_index(2, 3, 200, 60, device, ragged=True)
    dense = fill((2, 3, 200, 16), torch.float32, device)
    packed = dense.clone().view(-1, 16)
    indptr = (torch.arange(7, device=device) * 60).int()
    kvcompress.compact_ragged_([packed], index.flatten(), indptr, torch.arange(6, device=device) * 200)
    kvcompress.compact_([dense], index)
    assert torch.equal(packed, dense.view(-1, 16))


def test_bitwise_run_to_run(device):
    *where, slots = stretches([6000, 10, 2500, 900], device)
    tensors = [fill((slots, 64), torch.bfloat16, device), fill((slots,), torch.int32, device)]
    runs = [[t.clone() for t in tensors] for _ in range(5)]
    for run in runs:
        kvcompress.compact_ragged_(run, *where)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run))


def test_empty(device):
    index, indptr, row_start, slots = stretches([3, 5], device)
    kvcompress.compact_ragged_([torch.empty(slots, 0, device=device)], index, indptr, row_start)
    kvcompress.compact_ragged_([torch.empty(0, 4, device=device)], index[:0], indptr * 0, row_start)
    kvcompress.compact_ragged_([torch.empty(8, 4, device=device)], index[:0], indptr[:1], row_start[:0])


def test_64_bit_offsets(device):
    """A row stride of 2^27 bytes: from row 16 on, offsets leave 31 bits."""
    stride = 2**27
    tensor = cases.far_apart((40, 16), torch.uint8, device, stride)
    tensor.copy_(fill((40, 16), torch.uint8, device))
    index = torch.tensor([1, 8, 14, 3, 19], dtype=torch.int32, device=device)
    indptr = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    row_start = torch.tensor([2, 20], device=device)
    expected = reference.compact_ragged([tensor.contiguous()], index, indptr, row_start)[0]
    kvcompress.compact_ragged_([tensor], index, indptr, row_start)
    assert torch.equal(tensor.contiguous(), expected)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_fuzz(data):
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    lengths = data.draw(st.lists(st.integers(0, 60), max_size=9))
    *where, slots = stretches(lengths, "cpu", room=data.draw(st.integers(0, 5)), padded=data.draw(st.booleans()))
    tensors = []
    for _ in range(data.draw(st.integers(1, 4))):
        dim, dtype = data.draw(st.integers(0, 40)), data.draw(st.sampled_from(DTYPES))
        tensors.append(fill((slots, dim), dtype) if dim else fill((slots,), dtype))
    check(tensors, *where)


def samples(device):
    index, indptr, row_start, slots = stretches([30, 0, 12, 25], device, padded=True)
    wide = [fill((slots, 16), torch.bfloat16, device), fill((slots,), torch.int32, device)]
    return [(wide, index, indptr, row_start), ([fill((slots, 7), torch.float32, device)], index, indptr, row_start)]


def ints(*values, dtype=torch.int32):
    return lambda device: torch.tensor(values, dtype=dtype, device=device)


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "tensors": [torch.randn(12, 4, device=device), torch.randn(12, device=device)],
            "index": torch.tensor([0, 2, 3, 1, 2], dtype=torch.int32, device=device),
            "indptr": torch.tensor([0, 3, 5], dtype=torch.int32, device=device),
            "row_start": torch.tensor([0, 6], device=device),
        }
        good.update({name: change(device) for name, change in changes.items()})
        return tuple(good.values())

    return args


NAME = "compact_ragged_"
RULE = f"{NAME}: index must be ascending in [0, slots) with -1 at the end, head by head"
BAD = [
    Bad("no_tensors", wrong(tensors=several()), f"{NAME}: tensors must be 1 to 8 tensors, got 0"),
    Bad(
        "rank",
        wrong(tensors=several(full(2, 6, 4))),
        f"{NAME}: tensors must be [slots, head_dim] or [slots], got 3D [2, 6, 4] at [0]",
    ),
    Bad(
        "slots",
        wrong(tensors=several(full(12, 4), full(11))),
        f"{NAME}: tensors must be of the slots of tensors[0] (12), got [11] at [1]",
    ),
    Bad(
        "overlap",
        wrong(tensors=several(lambda d: torch.ones(1, 4, device=d).expand(12, 4))),
        f"{NAME}: tensors must be free of overlapping rows, got a stride of 0 in dimension 0 at [0]",
    ),
    Bad("index_rank", wrong(index=full(2, 3, dtype=torch.int32)), f"{NAME}: index must be [total], got 2D [2, 3]"),
    Bad("index_dtype", wrong(index=ints(1, 2, dtype=torch.int64)), f"{NAME}: index must be int32, got int64"),
    Bad(
        "row_start_rank",
        wrong(row_start=full(1, 2, dtype=torch.int64)),
        f"{NAME}: row_start must be [batch * heads], got 2D [1, 2]",
    ),
    Bad("row_start_dtype", wrong(row_start=ints(0, 6)), f"{NAME}: row_start must be int64, got int32"),
    Bad("indptr", wrong(indptr=ints(0, 5)), f"{NAME}: indptr must be [batch * heads + 1] (3), got 1D [2]"),
    Bad("indptr_dtype", wrong(indptr=ints(0, 3, 5, dtype=torch.int64)), f"{NAME}: indptr must be int32, got int64"),
    Bad(
        "indptr_order",
        wrong(indptr=ints(0, 5, 3)),
        f"{NAME}: indptr must be from 0 to total (5), never descending, got 3 at [2]",
        reads_data=True,
    ),
    Bad("range", wrong(index=ints(0, 2, 3, 1, 12)), f"{RULE}, got 12 at [4]", reads_data=True),
    Bad("order", wrong(index=ints(0, 3, 2, 1, 2)), f"{RULE}, got 2 at [2]", reads_data=True),
    Bad("padding_inside", wrong(index=ints(0, 2, 3, -1, 2)), f"{RULE}, got 2 at [4]", reads_data=True),
]
