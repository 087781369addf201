"""mass_count against whole numbers of Python, exactly: CPU and CUDA alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcompress
from tests import cases
from tests.bad_inputs import Bad
from tests.reference import budget as reference

SHARES = [0.9, 0.5, 1.0, 1e-9, 0.999999]


def check(mass, share):
    counts = kvcompress.mass_count(mass, share)
    assert counts.dtype == torch.int32
    assert torch.equal(counts.cpu(), reference.mass_count(mass.cpu(), share))
    assert torch.equal(counts, kvcompress.mass_count(mass, share))


def attention(batch, heads, seq_len, peak, device):
    """Mean softmax rows, flat to peaked."""
    return (peak * torch.randn(batch, heads, 4, seq_len, device=device)).softmax(-1).mean(2)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("peak", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("seq_len", [1, 2, 31, 1000, 4097])
def test_attention(seq_len, peak, share, device):
    check(attention(2, 3, seq_len, peak, device), share)


KINDS = {
    "ties": lambda d: torch.randint(0, 4, (2, 3, 500), device=d).float() / 64,
    "equal": lambda d: torch.full((1, 2, 3000), 1 / 3000, device=d),
    "zeros": lambda d: torch.zeros(1, 2, 70, device=d),
    "one_of_all": lambda d: torch.nn.functional.one_hot(torch.tensor([[3, 69]], device=d), 70).float(),
    "below_a_unit": lambda d: torch.full((1, 1, 50), 2.0**-42, device=d),  # rounds to nothing
    "half_a_unit": lambda d: (torch.arange(40, device=d).float() * 2.0**-41).view(1, 1, 40),  # halves to even
    "denormal": lambda d: torch.full((1, 1, 9), 1e-42, device=d),
    "column_sums": lambda d: 5e5 * torch.rand(1, 2, 20, device=d) ** 9,  # sums of many queries
    "no_numbers": lambda d: torch.tensor([[[0.5, -torch.inf, torch.nan, 0.25, torch.inf, -1.0, 0.25, -0.0]]], device=d),
    "padding": lambda d: torch.cat([torch.full((1, 2, 9), -torch.inf, device=d), torch.rand(1, 2, 90, device=d)], 2),
    "leading_bits": lambda d: 0.5 + torch.rand(1, 2, 3000, device=d) * 2.0**-14,  # equal but for the last digit
}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_structure(kind, share, device):
    check(KINDS[kind](device), share)


def test_strides_and_empty(device):
    check(cases.strided(attention(2, 3, 65, 3.0, device)), 0.8)
    check(attention(3, 2, 65, 3.0, device).transpose(0, 1), 0.8)
    assert kvcompress.mass_count(torch.zeros(2, 3, 0, device=device), 0.5).tolist() == [[0] * 3] * 2
    assert kvcompress.mass_count(torch.zeros(0, 3, 5, device=device), 0.5).shape == (0, 3)


@settings(deadline=None, max_examples=200)
@given(
    row=st.lists(st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.125, 2.0**-30])), min_size=1, max_size=60),
    share=st.floats(1e-6, 1),
)
def test_fuzz(row, share):
    check(torch.tensor([[row]]), share)


def samples(device):
    return [(attention(2, 3, 40, 2.0, device), 0.9)]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        good = {"mass": torch.rand(2, 3, 16, device=device), "share": 0.5}
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


NAME = "mass_count"
BAD = [
    Bad(
        "rank",
        wrong(mass=lambda d: torch.rand(3, 4, device=d)),
        f"{NAME}: mass must be [batch, heads, seq_len], got 2D",
    ),
    Bad(
        "dtype",
        wrong(mass=lambda d: torch.rand(2, 3, 4, device=d).half()),
        f"{NAME}: mass must be float32, got float16",
    ),
    Bad(
        "stride",
        wrong(mass=lambda d: torch.rand(2, 16, 3, device=d).mT),
        f"{NAME}: mass must be contiguous in the last dimension, got a last stride of 3",
    ),
    Bad("share_zero", wrong(share=0.0), f"{NAME}: share must be in (0, 1], got 0.0"),
    Bad("share_large", wrong(share=1.5), f"{NAME}: share must be in (0, 1], got 1.5"),
    Bad("share_nan", wrong(share=float("nan")), f"{NAME}: share must be in (0, 1], got nan"),
]
