"""ZigZagKV: entries that hold tau of the attention, and budgets before and after the reference's rounding.

The reference averages the counts over the batch and loses what rounding and clamping cut off; ours are per row and sum to the
total. So the unrounded budgets are compared, through the allocator in units of 2^-24 entries, and its rounding of them.
"""

from __future__ import annotations

import torch

from kvcompress.budget import allocate, mass_count
from tests.methods.golden import Golden

UNITS = 2**24


def replay(case: Golden) -> None:
    attention = case["attention"]
    layers, _, _, window, seq_len = attention.shape
    assert (case.take("layers"), case.take("window_size"), case.take("seq_len")) == (layers, window, seq_len)
    share, beta = 1 - case.take("compression_ratio"), case.take("b_bound_ratio")

    mass = attention.mean(-2)
    counts = mass_count(mass.flatten(0, 1), case.take("attention_threshold")).view(mass.shape[:-1])
    assert torch.equal(counts.long(), case["mba"])
    needs = counts.double().mean((1, 2))
    assert torch.allclose(needs.float(), case["lmba"])

    mean = share * seq_len
    budgets = allocate(round(layers * mean * UNITS), needs.tolist(), base=beta * mean * UNITS)
    budgets = torch.tensor(budgets).double() / UNITS
    assert torch.allclose(budgets, case["budget_float"], rtol=0, atol=layers * 1e-5)  # lmba is float32 there
    assert torch.equal(case["budget_float"].round().clamp(1, seq_len).long(), case["budget"])
