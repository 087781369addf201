"""DenseStore against a list of rows: what is kept, where, at which position, at which cost."""

from __future__ import annotations

import pytest
import torch

from kvcompress.cache import DenseStore

HEADS, DIM = 2, 8


class Model:
    """The obvious store: a Python list of (position, k, v) for each row and head."""

    def __init__(self, keys, values, lengths):
        seq_len = keys.shape[2]
        self.entries = [
            [
                [(i, keys[b, h, seq_len - n + i], values[b, h, seq_len - n + i]) for i in range(n)]
                for h in range(keys.shape[1])
            ]
            for b, n in enumerate(lengths)
        ]
        self.seen = list(lengths)

    def append(self, keys, values, real):
        new = keys.shape[2]
        for b, n in enumerate(real):
            for h, head in enumerate(self.entries[b]):
                head += [(self.seen[b] + i, keys[b, h, new - n + i], values[b, h, new - n + i]) for i in range(n)]
            self.seen[b] += n

    def keep(self, index, counts):
        for b, n in enumerate(counts):
            for h in range(len(self.entries[b])):
                self.entries[b][h] = [self.entries[b][h][i] for i in index[b, h, :n].tolist()]

    def assert_equals(self, store):
        assert store.seen == self.seen
        assert store.lengths == [len(row[0]) for row in self.entries]
        for b, row in enumerate(self.entries):
            for h, head in enumerate(row):
                n = len(head)
                assert store.positions[b, h, :n].tolist() == [p for p, _, _ in head]
                if n:
                    assert torch.equal(store.keys[b, h, :n], torch.stack([k for _, k, _ in head]))
                    assert torch.equal(store.values[b, h, :n], torch.stack([v for _, _, v in head]))
        assert store.keys.isfinite().all()
        assert store.values.isfinite().all()


def fresh(lengths, seq_len, device, reserve=4):
    keys, values = (torch.randn(len(lengths), HEADS, seq_len, DIM, device=device) for _ in range(2))
    return DenseStore.from_prefill(keys, values, lengths, reserve=reserve), Model(keys, values, lengths)


def tokens(batch, n, device):
    return tuple(torch.randn(batch, HEADS, n, DIM, device=device) for _ in range(2))


def random_index(lengths, counts, device):
    k = max(counts)
    index = torch.full((len(lengths), HEADS, k), -1, dtype=torch.int32)
    for b, (n, c) in enumerate(zip(lengths, counts)):
        for h in range(HEADS):
            index[b, h, :c] = torch.randperm(n)[:c].sort().values
    return index.to(device)


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4], [0, 9], [1, 5]])
def test_random_life(lengths, device):
    """Appends, cuts, crops and reorders in random order leave exactly what a list would hold."""
    generator = torch.Generator().manual_seed(sum(lengths))
    store, model = fresh(lengths, 9, device)
    model.assert_equals(store)
    for _ in range(60):
        kind = int(torch.randint(0, 4, (1,), generator=generator))
        batch = store.batch
        if kind <= 1:
            n = int(torch.randint(1, 4, (1,), generator=generator))
            real = [n] * batch if kind == 0 else torch.randint(0, n + 1, (batch,), generator=generator).tolist()
            keys, values = tokens(batch, n, device)
            store.append(keys, values, None if kind == 0 else real)
            model.append(keys, values, real)
        elif kind == 2:
            counts = [int(torch.randint(0, n + 1, (1,), generator=generator)) for n in store.lengths]
            index = random_index(store.lengths, counts, device)
            store.keep(index, counts)
            model.keep(index, counts)
        else:
            order = torch.randint(0, batch, (batch,), generator=generator)
            store.select_rows(order.to(device))
            model.entries = [[list(head) for head in model.entries[i]] for i in order.tolist()]
            model.seen = [model.seen[i] for i in order.tolist()]
        model.assert_equals(store)


def test_appends_in_place(device):
    store, _ = fresh([9, 9], 9, device, reserve=32)
    address = store.keys.data_ptr()
    for _ in range(32):
        store.append(*tokens(2, 1, device))
    assert store.keys.data_ptr() == address
    store.append(*tokens(2, 1, device))
    assert store.keys.data_ptr() != address
    assert store.capacity >= 42 + 31


def test_cut_gives_bytes_back(device):
    store, _ = fresh([4000, 4000], 4000, device)
    full = store.nbytes
    index = torch.arange(100, dtype=torch.int32, device=device).expand(2, HEADS, 100).contiguous()
    store.keep(index, [100, 100])
    assert store.nbytes <= full * (100 + store.reserve) / 4000


def test_small_cut_stays_in_place(device):
    store, _ = fresh([100, 100], 100, device, reserve=64)
    address = store.keys.data_ptr()
    index = torch.arange(1, 100, dtype=torch.int32, device=device).expand(2, HEADS, 99).contiguous()
    store.keep(index, [99, 99])
    assert store.keys.data_ptr() == address


def test_crop(device):
    store, model = fresh([9, 4], 9, device)
    store.crop(3)
    model.entries = [[head[:-3] for head in row] for row in model.entries]
    model.seen = [6, 1]
    model.assert_equals(store)
    with pytest.raises(ValueError, match="DenseStore.crop: tokens must be at most the stored entries"):
        store.crop(2)


def test_state_dict_round_trip(device):
    store, model = fresh([9, 4], 9, device)
    store.extra["sink_keys"] = torch.randn(2, HEADS, 2, DIM, device=device)
    store.targets = [8, 20]
    copy = DenseStore.from_state_dict(store.state_dict())
    model.assert_equals(copy)
    assert copy.targets == [8, 20]
    assert torch.equal(copy.extra["sink_keys"], store.extra["sink_keys"])
    new = tokens(2, 1, device)
    copy.append(*new)
    store.append(*new)
    assert torch.equal(copy.view()[0], store.view()[0])


def test_query_head_storage(device):
    keys, values = (torch.randn(1, HEADS, 6, DIM, device=device) for _ in range(2))
    index = torch.tensor([[[0, 1], [2, 3], [4, 5], [0, 5]]], dtype=torch.int32, device=device)
    store = DenseStore.gathered(keys, values, index, [2], [6])
    assert torch.equal(store.keys[0, 1, :2], keys[0, 0, 2:4])
    assert torch.equal(store.keys[0, 3, :2], keys[0, 1][[0, 5]])
    new = tokens(1, 1, device)
    store.append(*new)
    assert torch.equal(store.keys[0, :, 2], new[0][0, [0, 0, 1, 1], 0])
