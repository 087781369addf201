"""RaggedStore against a list of entries for every row and head, and its attention against the dense one of each head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompress.ragged import RaggedStore

HEADS, DIM = 3, 16


def packed(index):
    """A padded index ``[batch, heads, k]``, -1 behind each head's entries, as index and indptr."""
    counts = (index >= 0).sum(-1).flatten()
    return index[index >= 0], torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def ragged_index(lengths, seq_len, counts, device):
    """Random ascending picks among each row's real entries (the last ones), a count a head."""
    index = torch.full((len(counts), HEADS, max(max(row) for row in counts) or 1), -1, dtype=torch.int32)
    for b, row in enumerate(counts):
        for h, n in enumerate(row):
            index[b, h, :n] = torch.randperm(lengths[b])[:n].sort().values.int() + seq_len - lengths[b]
    return index.to(device)


def fresh(lengths, seq_len, counts, device, reserve=3):
    keys, values = (torch.randn(len(lengths), HEADS, seq_len, DIM, device=device) for _ in range(2))
    index = ragged_index(lengths, seq_len, counts, device)
    store = RaggedStore.gathered(keys, values, *packed(index), lengths, reserve=reserve)
    entries = [
        [
            [(i - seq_len + lengths[b], keys[b, h, i], values[b, h, i]) for i in index[b, h, :n].tolist()]
            for h, n in enumerate(row)
        ]
        for b, row in enumerate(counts)
    ]
    return store, entries


def assert_holds(store, entries):
    assert store.head_lengths == [[len(head) for head in row] for row in entries]
    positions = store.padded_positions()
    assert store.keys.isfinite().all()
    state = store.state_dict()
    flat = [entry for row in entries for head in row for entry in head]
    assert state["positions"].tolist() == [p for p, _, _ in flat]
    if flat:
        assert torch.equal(state["keys"], torch.stack([k for _, k, _ in flat]))
        assert torch.equal(state["values"], torch.stack([v for _, _, v in flat]))
    for b, row in enumerate(entries):
        for h, head in enumerate(row):
            assert positions[b, h].tolist() == [p for p, _, _ in head] + [-1] * (positions.shape[2] - len(head))


def add(entries, seen, keys, values, real):
    new = keys.shape[2]
    for b, n in enumerate(real):
        for h, head in enumerate(entries[b]):
            head += [(seen[b] + i, keys[b, h, new - n + i], values[b, h, new - n + i]) for i in range(n)]
        seen[b] += n


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [([20, 20], [[5, 0, 12], [1, 20, 3]]), ([20, 7], [[20, 2, 9], [7, 1, 0]]), ([20], [[1, 1, 1]])],
)
def test_random_life(lengths, counts, device):
    """Appends over several renewals of the room, cuts, crops and reorders leave exactly what a list would hold."""
    generator = torch.Generator().manual_seed(sum(lengths))
    store, entries = fresh(lengths, 20, counts, device)
    seen = list(lengths)
    assert_holds(store, entries)
    for _ in range(40):
        batch = store.batch
        kind = int(torch.randint(0, 5, (1,), generator=generator))
        if kind <= 2:
            n = int(torch.randint(1, 6, (1,), generator=generator))
            real = [n] * batch if kind else torch.randint(0, n + 1, (batch,), generator=generator).tolist()
            keys, values = (torch.randn(batch, HEADS, n, DIM, device=device) for _ in range(2))
            store.append(keys, values, real if kind == 0 else None)
            add(entries, seen, keys, values, real)
        elif kind == 3:
            counts = [
                [int(torch.randint(0, len(head) + 1, (1,), generator=generator)) for head in row] for row in entries
            ]
            index = torch.full((batch, HEADS, max(max(row) for row in counts) or 1), -1, dtype=torch.int32)
            for b, row in enumerate(counts):
                for h, n in enumerate(row):
                    picked = torch.randperm(len(entries[b][h]), generator=generator)[:n].sort().values
                    index[b, h, :n] = picked.int()
                    entries[b][h] = [entries[b][h][i] for i in picked.tolist()]
            store.keep(*packed(index.to(device)))
        else:
            order = torch.randint(0, batch, (batch,), generator=generator)
            store.select_rows(order.to(device))
            entries = [[list(head) for head in entries[i]] for i in order.tolist()]
            seen = [seen[i] for i in order.tolist()]
        assert store.seen == seen
        assert_holds(store, entries)


@pytest.mark.parametrize("new", [1, 5, 19])
@pytest.mark.parametrize("group", [1, 4])
def test_attends_each_head_over_its_own(new, group, device):
    store, entries = fresh([30, 30], 30, [[30, 3, 11], [8, 1, 25]], device, reserve=64)
    keys, values = (torch.randn(2, HEADS, new, DIM, device=device) for _ in range(2))
    store.append(keys, values)
    add(entries, [30, 30], keys, values, [new, new])
    queries = torch.randn(2, HEADS * group, new, DIM, device=device)
    out = store.attend(queries, softmax_scale=0.3)
    for b in range(2):
        for q_head in range(HEADS * group):
            head = entries[b][q_head // group]
            k, v = (torch.stack([e[i] for e in head]).double() for i in (1, 2))
            mask = torch.ones(new, len(head), dtype=torch.bool, device=device).tril(len(head) - new)
            expected = F.scaled_dot_product_attention(
                queries[b, q_head].double()[None], k[None], v[None], attn_mask=mask, scale=0.3
            )[0]
            assert torch.allclose(out[b, q_head].double(), expected, atol=2e-6)


def test_memory_is_the_heads_own(device):
    """Ten entries here and a thousand there cost what they are, not heads times the longest."""
    store, _ = fresh([1000], 1000, [[1000, 10, 10]], device, reserve=16)
    entry = 2 * DIM * 4 + 4
    assert store.nbytes <= (1020 + 3 * 16) * entry + 64
    address = store.keys.data_ptr()
    for _ in range(16):
        store.append(*(torch.randn(1, HEADS, 1, DIM, device=device) for _ in range(2)))
    assert store.keys.data_ptr() == address  # appended in place
    index = torch.arange(5, dtype=torch.int32, device=device).expand(1, HEADS, 5)
    store.keep(*packed(index))
    assert store.nbytes <= (15 + 3 * 16) * entry + 64


@pytest.mark.parametrize("extra", [0, 1])
def test_cuts_that_free_little_stay_in_place(extra, device):
    """As long as the buffer is at most twice the room larger than what is kept: the same memory, and no more of it."""
    reserve = 8
    store, entries = fresh([500], 500, [[400, 60, 200]], device, reserve=reserve)
    addresses = [t.data_ptr() for t in store.tensors.values()]
    drop = HEADS * reserve + extra  # the room is there already
    kept = [[head[(drop if h == 0 else 0) :] for h, head in enumerate(row)] for row in entries]
    counts = torch.tensor([400 - drop, 60, 200], device=device)
    begin = torch.tensor([drop, 0, 0], device=device)
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    index = torch.cat([torch.arange(b, b + n, device=device) for b, n in zip(begin.tolist(), counts.tolist())]).int()
    store.keep(index, indptr)
    assert_holds(store, kept)
    assert ([t.data_ptr() for t in store.tensors.values()] == addresses) == (extra == 0)
    seen = [500]
    for new in (3, 5, 9, 1):  # the room behind each head is still there, then renewed
        keys, values = (torch.randn(1, HEADS, new, DIM, device=device) for _ in range(2))
        store.append(keys, values)
        add(kept, seen, keys, values, [new])
        assert_holds(store, kept)


@pytest.mark.cuda
def test_what_a_cut_allocates():
    """In place: the index' size. Into smaller buffers: one of them at a time beside the old ones."""
    n, dim, device = 4096, 128, "cuda"
    keys = torch.randn(1, 8, n, dim, device=device, dtype=torch.bfloat16)

    def cut(store, each):
        index = torch.arange(each, dtype=torch.int32, device=device).repeat(8)
        indptr = each * torch.arange(9, dtype=torch.int32, device=device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        store.keep(index, indptr)
        return torch.cuda.max_memory_allocated() - before

    def stored(reserve):
        index = torch.arange(n, dtype=torch.int32, device=device).repeat(8)
        indptr = n * torch.arange(9, dtype=torch.int32, device=device)
        return RaggedStore.gathered(keys, keys, index, indptr, [n], reserve=reserve)

    assert cut(stored(512), n - 512) <= 64 * 1024
    one = 8 * (n // 2 + 16) * dim * 2
    assert cut(stored(16), n // 2) <= one + 16 * 8 * n  # indices of the entries, 8 bytes each


def test_crop(device):
    store, entries = fresh([20], 20, [[5, 9, 2]], device)
    store.append(*(torch.randn(1, HEADS, 2, DIM, device=device) for _ in range(2)))
    store.crop(2)
    assert_holds(store, entries)
    assert store.seen == [20]
    with pytest.raises(
        ValueError, match="RaggedStore.crop: tokens must be at most the shortest head's 2 entries, got 3"
    ):
        store.crop(3)


def test_state_dict_round_trip(device):
    store, entries = fresh([20, 7], 20, [[5, 9, 2], [7, 0, 1]], device)
    store.targets = [6, 3]
    copy = RaggedStore.from_state_dict(store.state_dict(), reserve=4)
    assert_holds(copy, entries)
    assert copy.targets == [6, 3]
    assert copy.seen == [20, 7]


class Launches(TorchDispatchMode):
    """Names of the ops that do more than look at a tensor."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(returned.alias_info is not None for returned in func._schema.returns) or func._schema.is_mutable:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_decode_step_is_two_launches_and_the_attention(device):
    """One op writes K, V and positions of all heads, one counts; no tensor is made from host numbers, nothing is read."""
    store, _ = fresh([30, 30], 30, [[30, 3, 11], [8, 1, 25]], device, reserve=64)
    keys, values = (torch.randn(2, HEADS, 1, DIM, device=device) for _ in range(2))
    with Launches() as seen:
        store.append(keys, values)
    assert seen.names == ["kvcompress::append_", "aten::add_"]
    with Launches() as seen:
        store.attend(torch.randn(2, HEADS, 1, DIM, device=device), softmax_scale=0.3)
    assert [name for name in seen.names if name != "aten::randn"] == ["kvcompress::ragged_decode_attention"]


def test_counts_on_the_device_are_not_waited_for(device):
    """Built from device counts and a known sum, the host learns the lengths when it asks for them."""
    index, indptr = packed(ragged_index([20], 20, [[5, 9, 2]], device))
    keys, values = (torch.randn(1, HEADS, 20, DIM, device=device) for _ in range(2))
    with Launches() as seen:
        store = RaggedStore.gathered(keys, values, index, indptr, [20], reserve=4)
        store.append(keys[:, :, :1], values[:, :, :1])
        assert store.seen == [21]
        assert not store.is_complete
        for each in (2, 1):  # into new buffers, and in place
            few = torch.arange(each, dtype=torch.int32, device=device).repeat(3)
            store.keep(few, each * torch.arange(4, dtype=torch.int32, device=device))
            store.reserve = 1
        store.append(keys[:, :, :3], values[:, :, :3])  # renews the room
    assert "aten::_local_scalar_dense" not in seen.names  # what .item() and .tolist() call
    assert store.head_lengths == [[4, 4, 4]]
    assert store.max_length == 4
