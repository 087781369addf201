"""cosine_importance against float64, and its promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import budget as reference

SHAPES = [(1, 1, 8), (2, 64, 64), (3, 65, 96), (1, 200, 4096), (2, 129, 33), (4, 7, 264)]


def make(shape, dtype, device):
    before = torch.randn(shape, device=device)
    before[..., 0] += 30  # an outlier channel, as residual streams have
    return before.to(dtype), (0.5 * torch.randn(shape, device=device)).to(dtype)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_update", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_against_float64(shape, dtype, is_update, padded, device):
    before, after = make(shape, dtype, device)
    start = cases.left_padding(shape[0], shape[1], device) if padded else None
    out = kvcompress.cosine_importance(before, after, seq_start=start, is_update=is_update)
    expected = reference.cosine_importance(before, after, start, is_update)
    # inputs are exact, so the error is float32 accumulation alone: eps * sqrt-ish of the terms added
    tolerance = 2 * torch.finfo(torch.float32).eps * (shape[2] ** 0.5 + shape[1] ** 0.5)
    assert out.dtype == torch.float32
    assert (out.double() - expected).abs().max() <= tolerance


def test_strided_views(device):
    before, after = make((2, 70, 64), torch.bfloat16, device)
    expected = kvcompress.cosine_importance(before, after)
    assert torch.equal(kvcompress.cosine_importance(cases.strided(before), cases.strided(after)), expected)


def test_bitwise_run_to_run(device):
    before, after = make((2, 333, 512), torch.bfloat16, device)
    first = kvcompress.cosine_importance(before, after)
    assert all(torch.equal(kvcompress.cosine_importance(before, after), first) for _ in range(5))


def test_empty(device):
    before = torch.empty(0, 4, 8, device=device)
    assert kvcompress.cosine_importance(before, before).shape == (0,)
    before = torch.empty(2, 0, 8, device=device)
    assert kvcompress.cosine_importance(before, before).isnan().all()


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 3), seq_len=st.integers(1, 150), hidden=st.integers(1, 200), seed=st.integers(0, 9999))
def test_fuzz(batch, seq_len, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(batch, seq_len, hidden, generator=generator) for _ in range(2))
    start = torch.randint(0, seq_len, (batch,), generator=generator, dtype=torch.int32)
    out = kvcompress.cosine_importance(before, after, seq_start=start)
    assert torch.allclose(out.double(), reference.cosine_importance(before, after, start), rtol=0, atol=1e-5)


def samples(device):
    before, after = make((2, 70, 48), torch.bfloat16, device)
    return [
        (before, after, None, False),
        (before.float(), after.float(), cases.left_padding(2, 70, device), True),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {
            "before": torch.randn(2, 6, 16, device=device),
            "after": torch.randn(2, 6, 16, device=device),
            "seq_start": torch.zeros(2, dtype=torch.int32, device=device),
            "is_update": False,
        }
        good.update({name: change(device) for name, change in changes.items()})
        return tuple(good.values())

    return args


def full(*shape, dtype=torch.float32):
    return lambda device: torch.ones(shape, dtype=dtype, device=device)


NAME = "cosine_importance"
BAD = [
    Bad("rank", wrong(before=full(6, 16)), f"{NAME}: before must be [batch, seq_len, hidden], got 2D [6, 16]"),
    Bad(
        "rank_after",
        wrong(after=full(1, 2, 6, 16)),
        f"{NAME}: after must be [batch, seq_len, hidden], got 4D [1, 2, 6, 16]",
    ),
    Bad(
        "dtype",
        wrong(before=full(2, 6, 16, dtype=torch.int32)),
        f"{NAME}: before must be float32, float16 or bfloat16, got int32",
    ),
    Bad(
        "float64",
        wrong(before=full(2, 6, 16, dtype=torch.float64)),
        f"{NAME}: before must be float32, float16 or bfloat16, got float64",
    ),
    Bad(
        "mixed",
        wrong(after=full(2, 6, 16, dtype=torch.float16)),
        f"{NAME}: after must be of the dtype of before (float32), got float16",
    ),
    Bad(
        "shape", wrong(after=full(2, 7, 16)), f"{NAME}: after must be of the shape of before [2, 6, 16], got [2, 7, 16]"
    ),
    Bad(
        "stride",
        wrong(before=lambda d: torch.ones(2, 16, 6, device=d).mT),
        f"{NAME}: before must be contiguous in the last dimension, got a last stride of 6",
    ),
    Bad(
        "seq_start_shape",
        wrong(seq_start=full(3, dtype=torch.int32)),
        f"{NAME}: seq_start must be [batch] (2), got 1D [3]",
    ),
    Bad("seq_start_dtype", wrong(seq_start=full(2, dtype=torch.int64)), f"{NAME}: seq_start must be int32, got int64"),
]
