"""gather against row-by-row copies, exactly."""

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


def check(tensors, index, capacity=None):
    out = kvcompress.gather(tensors, index, capacity=capacity)
    expected = reference.gather(
        [t.cpu() for t in tensors], index.cpu(), index.shape[2] if capacity is None else capacity
    )
    assert len(out) == len(tensors)
    for o, e in zip(out, expected):
        assert o.is_contiguous()
        assert o.dtype == e.dtype
        assert torch.equal(o.cpu(), e)


def any_index(batch, heads, k, seq_len, device):
    """In any order, with repeats and -1 anywhere."""
    return torch.randint(-1, seq_len, (batch, heads, k), dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 33, 80, 128])
def test_dtypes(dtype, head_dim, device):
    tensors = [fill((2, 3, 40, head_dim), dtype, device), fill((2, 3, 40), dtype, device)]
    check(tensors, cases.kept_index(2, 3, 40, 20, device, ragged=True), capacity=33)
    check(tensors, any_index(2, 3, 55, 40, device))


@pytest.mark.parametrize("q_per_kv", [1, 4, 8])
def test_query_heads(q_per_kv, device):
    """Storage per query head: index head h reads tensor head h // q_per_kv; scores come per query head already."""
    heads = 2 * q_per_kv
    tensors = [fill((2, 2, 50, 64), torch.bfloat16, device), fill((2, heads, 50), torch.float32, device)]
    check(tensors, cases.kept_index(2, heads, 50, 20, device, ragged=True), capacity=24)


@pytest.mark.parametrize(
    ("seq_len", "k", "capacity"), [(1, 1, 1), (5, 0, 7), (700, 699, 699), (3000, 1024, 1100), (4000, 2500, 2501)]
)
def test_sizes(seq_len, k, capacity, device):
    tensors = [fill((1, 2, seq_len, 64), torch.bfloat16, device), fill((1, 2, seq_len), torch.int32, device)]
    check(tensors, cases.kept_index(1, 2, seq_len, k, device), capacity)


def test_strided_views(device):
    base = fill((2, 90, 3, 64), torch.bfloat16, device)
    odd = fill((2 * 3 * 90 * 10 + 1,), torch.uint8, device)[1:].view(2, 3, 90, 10)
    shared = fill((2, 1, 90, 8), torch.float32, device).expand(2, 3, 90, 8)
    check(
        [base.transpose(1, 2), cases.strided(fill((2, 3, 90, 20), torch.float32, device)), odd, shared],
        any_index(2, 6, 64, 90, device)[:, ::2],
        70,
    )


def test_64_bit_offsets(device):
    tensor = cases.far_apart((2, 2, 50, 16), torch.uint8, device, 2**31 + 64)
    tensor.copy_(fill((2, 2, 50, 16), torch.uint8, device))
    index = any_index(2, 2, 30, 50, device)
    expected = reference.gather([tensor.contiguous()], index, 30)[0]
    assert torch.equal(kvcompress.gather([tensor], index)[0], expected)


def test_wide_rows(device):
    check([fill((1, 2, 20, 20_000), torch.float32, device)], any_index(1, 2, 9, 20, device))


def test_sources_stay(device):
    source = fill((1, 2, 30, 16), torch.float32, device)
    before = source.clone()
    first = kvcompress.gather([source], any_index(1, 2, 10, 30, device))[0]
    first.zero_()
    assert torch.equal(source, before)


def test_bitwise_run_to_run(device):
    source = fill((2, 4, 500, 64), torch.bfloat16, device)
    index = any_index(2, 4, 300, 500, device)
    runs = [kvcompress.gather([source], index)[0] for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_empty(device):
    for shape, heads, k in [
        ((0, 2, 8, 4), 2, 3),
        ((2, 0, 8, 4), 0, 3),
        ((2, 3, 0, 4), 3, 0),
        ((2, 3, 8, 0), 3, 3),
        ((2, 3, 8, 4), 3, 0),
    ]:
        index = torch.zeros(shape[0], heads, k, dtype=torch.int32, device=device)
        (out,) = kvcompress.gather([torch.empty(shape, device=device)], index, capacity=5)
        assert out.shape == (shape[0], heads, 5, shape[3])
        assert out.numel() == 0 or not out.any() or k > 0


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_fuzz(data):
    batch, heads, groups = (data.draw(st.integers(1, 3)) for _ in range(3))
    seq_len, k = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 60))
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    tensors = []
    for _ in range(data.draw(st.integers(1, 3))):
        dtype, head_dim = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 40))
        t = fill((batch, heads, seq_len, head_dim), dtype) if head_dim else fill((batch, heads, seq_len), dtype)
        tensors.append(cases.strided(t) if head_dim and data.draw(st.booleans()) else t)
    check(tensors, any_index(batch, heads * groups, k, seq_len, "cpu"), k + data.draw(st.integers(0, 9)))


def samples(device):
    index = cases.kept_index(2, 6, 30, 12, device, ragged=True)
    return [
        ([fill((2, 3, 30, 16), torch.bfloat16, device), fill((2, 6, 30), torch.float32, device)], index, 20),
        ([fill((2, 6, 30, 7), torch.float32, device)], index, 12),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "tensors": [torch.randn(2, 3, 6, 4, device=device), torch.randn(2, 3, 6, device=device)],
            "index": torch.arange(5, dtype=torch.int32, device=device).expand(2, 3, 5),
            "capacity": 8,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


def values(*row):
    return lambda device: torch.tensor(row, dtype=torch.int32, device=device).expand(2, 3, len(row))


NAME = "gather"
BAD = [
    Bad("no_tensors", wrong(tensors=several()), f"{NAME}: tensors must be 1 to 8 tensors, got 0"),
    Bad("nine_tensors", wrong(tensors=several(*[full(2, 3, 6)] * 9)), f"{NAME}: tensors must be 1 to 8 tensors, got 9"),
    Bad(
        "rank",
        wrong(tensors=several(full(2, 3, 6), full(1, 2, 3, 6, 4))),
        f"{NAME}: tensors must be [batch, heads, seq_len, head_dim] or [batch, heads, seq_len], got 5D [1, 2, 3, 6, 4] at [1]",
    ),
    Bad(
        "element_size",
        wrong(tensors=several(full(2, 3, 6, dtype=torch.complex128))),
        f"{NAME}: tensors must be of elements of 1, 2, 4 or 8 bytes, got 16 at [0]",
    ),
    Bad(
        "stride",
        wrong(tensors=several(lambda d: torch.ones(2, 3, 4, 6, device=d).mT)),
        f"{NAME}: tensors must be contiguous in the last dimension, got a last stride of 6 at [0]",
    ),
    Bad(
        "batch",
        wrong(tensors=several(full(1, 3, 6, 4))),
        f"{NAME}: tensors must be of the batch of index (2) and the seq_len of tensors[0] (6), got [1, 3, 6, 4] at [0]",
    ),
    Bad(
        "seq_len",
        wrong(tensors=several(full(2, 3, 6, 4), full(2, 3, 7, 4))),
        f"{NAME}: tensors must be of the batch of index (2) and the seq_len of tensors[0] (6), got [2, 3, 7, 4] at [1]",
    ),
    Bad(
        "index_rank",
        wrong(index=full(3, 5, dtype=torch.int32)),
        f"{NAME}: index must be [batch, heads, k], got 2D [3, 5]",
    ),
    Bad("index_dtype", wrong(index=full(2, 3, 5, dtype=torch.int64)), f"{NAME}: index must be int32, got int64"),
    Bad(
        "index_heads",
        wrong(index=full(2, 4, 5, dtype=torch.int32)),
        f"{NAME}: index must be of a multiple of 3 heads, got 4 at [0]",
    ),
    Bad("capacity", wrong(capacity=4), f"{NAME}: capacity must be at least k (5), got 4"),
    Bad("capacity_negative", wrong(capacity=-1), f"{NAME}: capacity must be at least k (5), got -1"),
    Bad(
        "range",
        wrong(index=values(0, 6)),
        f"{NAME}: index must be -1 or in [0, seq_len), got 6 at [0, 0, 1]",
        reads_data=True,
    ),
    Bad(
        "negative",
        wrong(index=values(-2, 6)),
        f"{NAME}: index must be -1 or in [0, seq_len), got -2 at [0, 0, 0]",
        reads_data=True,
    ),
]
