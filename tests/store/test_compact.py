"""compact_ against row-by-row copies. Bytes are copied, so everything compares exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import store as reference

DTYPES = [
    torch.uint8,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int32,
    torch.float64,
    torch.int64,
]


def fill(shape, dtype, device="cpu"):
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 120, shape, device=device).to(dtype)


def check(tensors, index):
    expected = reference.compact([t.cpu() for t in tensors], index.cpu())
    kvcompress.compact_(tensors, index)
    for t, e in zip(tensors, expected):
        assert torch.equal(t.cpu(), e)


def layer(batch, heads, seq_len, head_dim, device, dtype=torch.bfloat16):
    """K, V, positions and scores, as a store keeps them."""
    shape = (batch, heads, seq_len)
    wide = [fill((*shape, head_dim), dtype, device) for _ in range(2)]
    return [*wide, fill(shape, torch.int32, device), fill(shape, torch.float32, device)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 33, 64, 80, 128])
@pytest.mark.parametrize("ragged", [False, True])
def test_dtypes(dtype, head_dim, ragged, device):
    index = cases.kept_index(2, 3, 50, 20, device, ragged=ragged)
    check([fill((2, 3, 50, head_dim), dtype, device), fill((2, 3, 50), dtype, device)], index)


@pytest.mark.parametrize(
    ("seq_len", "k"),
    [(1, 1), (7, 7), (100, 1), (513, 500), (3000, 1024), (2048, 2048), (2100, 2049), (4500, 3000), (9001, 2500)],
)
def test_sizes(seq_len, k, device):
    check(layer(1, 2, seq_len, 64, device), cases.kept_index(1, 2, seq_len, k, device))
    check(layer(2, 1, seq_len, 24, device), cases.kept_index(2, 1, seq_len, k, device, ragged=True))


@pytest.mark.parametrize("k", [300, 2600])
@pytest.mark.parametrize(
    "pattern",
    [
        "tail",
        "head",
        "shift_by_one",
        "shift_by_many",
        "one_far",
        "head_then_tail",
        "head_then_every_other",
        "every_other",
        "four_of_five",
        "five_of_six",
        "none",
    ],
)
def test_patterns(pattern, k, device):
    seq_len = 2 * k
    kept = {
        "tail": range(seq_len - k, seq_len),
        "head": range(k),
        "shift_by_one": range(1, k + 1),
        "shift_by_many": range(k // 3, k // 3 + k),
        "one_far": [*range(k - 1), seq_len - 1],
        "head_then_tail": [*range(k // 2), *range(seq_len - k + k // 2, seq_len)],
        "head_then_every_other": [*range(k // 2), *range(k // 2, seq_len, 2)][:k],
        "every_other": range(0, seq_len, 2),
        "four_of_five": [i for i in range(seq_len) if i % 5 != 2][:k],
        "five_of_six": [i for i in range(seq_len) if i % 6 != 2][:k],
        "none": [-1] * k,
    }[pattern]
    index = torch.tensor([*kept], dtype=torch.int32, device=device).expand(1, 3, k).contiguous()
    check(layer(1, 3, seq_len, 32, device), index)


@pytest.mark.parametrize("seq_len", [200, 5000])
def test_strided_views(seq_len, device):
    k = seq_len * 3 // 5
    base = fill((2, seq_len, 3, 64), torch.bfloat16, device)  # a [batch, seq_len, heads, head_dim] cache
    packed = fill((2, 3, seq_len, 2, 40), torch.float16, device)  # K and V side by side
    tensors = [
        base.transpose(1, 2),
        packed[..., 0, :],
        packed[..., 1, :],
        cases.strided(fill((2, 3, seq_len, 20), torch.float32, device)),
    ]
    offset = fill((2 * 3 * seq_len * 9 + 1,), torch.uint8, device)[1:].view(2, 3, seq_len, 9)
    index = cases.kept_index(2, 6, seq_len, k, device)[:, ::2]
    check([*tensors, offset], index)


@pytest.mark.parametrize("k", [64, 2500])
def test_eight_tensors(k, device):
    shape = (1, 2, 3000)
    tensors = [fill((*shape, d), dtype, device) for d, dtype in zip((128, 64, 5, 1, 2000), DTYPES[1:])]
    tensors += [fill(shape, dtype, device) for dtype in (torch.uint8, torch.int64, torch.bfloat16)]
    check(tensors, cases.kept_index(1, 2, 3000, k, device, ragged=True))


def test_rows_behind_stay(device):
    """Rows at k and behind, and slots of -1, keep what they held."""
    t = torch.arange(8.0, device=device).view(1, 1, 8, 1)
    kvcompress.compact_([t], torch.tensor([[[2, 5, -1, -1]]], dtype=torch.int32, device=device))
    assert t.flatten().tolist() == [2, 5, 2, 3, 4, 5, 6, 7]


def test_after_topk(device):
    scores = torch.randn(2, 4, 900, device=device)
    keys = scores[..., None].repeat(1, 1, 1, 16)
    index = kvcompress.topk(scores, 300)
    kvcompress.compact_([keys], index)
    assert torch.equal(keys[:, :, :300, 7], scores.gather(-1, index.long()))


def test_bitwise_run_to_run(device):
    tensors = layer(2, 4, 6000, 64, device)
    index = cases.kept_index(2, 4, 6000, 2700, device)
    runs = [[t.clone() for t in tensors] for _ in range(5)]
    for run in runs:
        kvcompress.compact_(run, index)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run))


def test_empty(device):
    for shape, k in [((0, 2, 8, 4), 3), ((2, 0, 8, 4), 3), ((2, 3, 0, 4), 0), ((2, 3, 8, 4), 0), ((2, 3, 8, 0), 3)]:
        t = torch.empty(shape, device=device)
        kvcompress.compact_([t], torch.zeros(*shape[:2], k, dtype=torch.int32, device=device))


@pytest.mark.parametrize("k", [40, 2100])
def test_64_bit_offsets(k, device):
    tensor = cases.far_apart((2, 2, 2200, 16), torch.uint8, device, 2**31 + 64)
    tensor.copy_(fill((2, 2, 2200, 16), torch.uint8, device))
    index = cases.kept_index(2, 2, 2200, k, device)
    expected = reference.compact([tensor.contiguous()], index.cpu())[0]
    kvcompress.compact_([tensor], index)
    assert torch.equal(tensor.contiguous(), expected)


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_fuzz(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    seq_len = data.draw(st.integers(1, 60))
    k = data.draw(st.integers(0, seq_len))
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    tensors = []
    for _ in range(data.draw(st.integers(1, 4))):
        dtype = data.draw(st.sampled_from(DTYPES))
        head_dim = data.draw(st.integers(0, 40))
        t = fill((batch, heads, seq_len, head_dim), dtype) if head_dim else fill((batch, heads, seq_len), dtype)
        tensors.append(cases.strided(t) if head_dim and data.draw(st.booleans()) else t)
    check(tensors, cases.kept_index(batch, heads, seq_len, k, "cpu", ragged=data.draw(st.booleans())))


def test_thousands(device):
    """Many small layers at random, each against the reference."""
    torch.manual_seed(3)
    for case in range(2000 if device == "cpu" else 300):
        seq_len = 1 + case % 47
        k = int(torch.randint(0, seq_len + 1, ()))
        shape = (1, 1 + case % 3, seq_len)
        tensors = [fill((*shape, 1 + case % 21), DTYPES[case % len(DTYPES)], device), fill(shape, torch.int32, device)]
        check(tensors, cases.kept_index(*shape, k, device, ragged=case % 2 == 0))


def samples(device):
    index = cases.kept_index(2, 3, 30, 12, device, ragged=True)
    return [(layer(2, 3, 30, 16, device), index), ([fill((2, 3, 30, 7), torch.float32, device)], index)]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "tensors": [torch.randn(2, 3, 6, 4, device=device), torch.randn(2, 3, 6, device=device)],
            "index": torch.arange(5, dtype=torch.int32, device=device).expand(2, 3, 5),
        }
        good.update({name: change(device) for name, change in changes.items()})
        return tuple(good.values())

    return args


def full(*shape, dtype=torch.float32):
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


def several(*makers):
    return lambda device: [make(device) for make in makers]


def entries(*values):
    """An index [2, 3, n] whose last head holds `values`."""

    def make(device):
        index = torch.arange(len(values), dtype=torch.int32, device=device).repeat(2, 3, 1)
        index[1, 2] = torch.tensor(values, dtype=torch.int32, device=device)
        return index

    return make


NAME = "compact_"
RULE = f"{NAME}: index must be ascending in [0, seq_len) with -1 at the end"
BAD = [
    Bad("no_tensors", wrong(tensors=several()), f"{NAME}: tensors must be 1 to 8 tensors, got 0"),
    Bad("nine_tensors", wrong(tensors=several(*[full(2, 3, 6)] * 9)), f"{NAME}: tensors must be 1 to 8 tensors, got 9"),
    Bad(
        "rank",
        wrong(tensors=several(full(3, 6))),
        f"{NAME}: tensors must be [batch, heads, seq_len, head_dim] or [batch, heads, seq_len], got 2D [3, 6] at [0]",
    ),
    Bad(
        "element_size",
        wrong(tensors=several(full(2, 3, 6, dtype=torch.complex128))),
        f"{NAME}: tensors must be of elements of 1, 2, 4 or 8 bytes, got 16 at [0]",
    ),
    Bad(
        "sizes",
        wrong(tensors=several(full(2, 3, 6, 4), full(2, 3, 7, 4))),
        f"{NAME}: tensors must be of the batch, heads and seq_len of tensors[0] [2, 3, 6, 4], got [2, 3, 7, 4] at [1]",
    ),
    Bad(
        "stride",
        wrong(tensors=several(lambda d: torch.ones(2, 3, 4, 6, device=d).mT)),
        f"{NAME}: tensors must be contiguous in the last dimension, got a last stride of 6 at [0]",
    ),
    Bad(
        "overlap",
        wrong(tensors=several(lambda d: torch.ones(2, 1, 6, 4, device=d).expand(2, 3, 6, 4))),
        f"{NAME}: tensors must be free of overlapping rows, got a stride of 0 in dimension 1 at [0]",
    ),
    Bad(
        "index_rank",
        wrong(index=full(3, 5, dtype=torch.int32)),
        f"{NAME}: index must be [batch, heads, k], got 2D [3, 5]",
    ),
    Bad("index_dtype", wrong(index=full(2, 3, 5, dtype=torch.int64)), f"{NAME}: index must be int32, got int64"),
    Bad(
        "index_stride",
        wrong(index=lambda d: torch.zeros(2, 5, 3, dtype=torch.int32, device=d).mT),
        f"{NAME}: index must be contiguous in the last dimension, got a last stride of 3",
    ),
    Bad(
        "index_heads", wrong(index=full(2, 4, 5, dtype=torch.int32)), f"{NAME}: index must be [2, 3, k], got [2, 4, 5]"
    ),
    Bad(
        "k_over",
        wrong(index=full(2, 3, 7, dtype=torch.int32)),
        f"{NAME}: index must be of at most seq_len (6) entries a head, got 7",
    ),
    Bad("range", wrong(index=entries(0, 1, 6)), f"{RULE}, got 6 at [1, 2, 2]", reads_data=True),
    Bad("negative", wrong(index=entries(0, 1, -2)), f"{RULE}, got -2 at [1, 2, 2]", reads_data=True),
    Bad("order", wrong(index=entries(0, 3, 2, 4)), f"{RULE}, got 2 at [1, 2, 2]", reads_data=True),
    Bad("twice", wrong(index=entries(1, 1)), f"{RULE}, got 1 at [1, 2, 1]", reads_data=True),
    Bad("padding_inside", wrong(index=entries(0, -1, 3)), f"{RULE}, got 3 at [1, 2, 2]", reads_data=True),
]
