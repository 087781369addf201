"""ZigZagKV: counts of attention mass and the split with a floor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.budget import ZigZag, mass_count
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.states import DTYPES, LENGTHS, alone, attention, kept, prompt, widened


@pytest.mark.parametrize(("tau", "count"), [(0.9, 4), (0.95 - 1e-6, 4), (1.0, 5), (0.49, 1), (0.01, 1)])
def test_worked_example_of_the_count(tau, count, device):
    mass = torch.tensor([[[0.05, 0.5, 0.15, 0.2, 0.1]]], device=device)
    assert int(mass_count(mass, tau)) == count
    padded = torch.cat([torch.full((1, 1, 3), -torch.inf, device=device), mass], 2)
    assert int(mass_count(padded, tau)) == count


def test_long_rows_do_not_stall():
    """A float32 running sum of 2^-20 stops growing near 2^4; here it would stop far too early to reach half of it all."""
    mass = torch.full((1, 1, 2**20), 2.0**-20)
    mass[..., 0] = 16.0
    assert int(mass_count(mass, 16.5 / 17)) == pytest.approx(2**19, abs=2)


@pytest.mark.parametrize(("length", "budgets"), [(1000, [19, 37, 64]), (50, [23, 47, 50])])
def test_worked_example_of_the_split(length, budgets):
    stage = ZigZag(40, beta=0.25)
    measured = [torch.tensor([u]) for u in (10.0, 30.0, 60.0)]
    assert [row[0] for row in stage.settle(measured, [length], floor=0)] == budgets


@settings(deadline=None, max_examples=60)
@given(
    needs=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    budget=st.one_of(st.integers(1, 300), st.floats(0.01, 1)),
    beta=st.floats(0, 0.95),
    length=st.integers(1, 400),
)
def test_meets_its_total_and_its_bound(needs, budget, beta, length):
    stage, layers = ZigZag(budget, beta=beta), len(needs)
    measured = [torch.tensor([float(min(n, length))], dtype=torch.float64) for n in needs]
    counts = [row[0] for row in stage.settle(measured, [length], floor=0)]
    mean = budget if isinstance(budget, int) else max(1, int(budget * length))
    assert sum(counts) == layers * min(mean, length)
    assert min(counts) >= min(int(beta * mean), length)
    (bound,) = stage.first(SimpleNamespace(num_layers=layers, lengths=[length]), None)
    assert max(counts) <= bound
    for floor in (0, min(7, length)):
        final = [row[0] for row in stage.settle(measured, [length], floor=floor)]
        for count in range(1, layers):  # bounds from the first layers: never below what they end up with
            bounds = [row[0] for row in stage.settle(measured[:count], [length], floor=floor, layers=layers)]
            assert all(n <= most for n, most in zip(final, bounds))
            assert sum(bounds) <= max(layers * mean, count * floor) + count


@pytest.mark.parametrize("dtype", DTYPES)
def test_measure(dtype, device):
    """The count of each row alone, from float64 attention, wherever no sum lies too near the threshold to tell."""
    stage, layer = ZigZag(0.5, window=8), prompt(LENGTHS, dtype=dtype, device=device)
    measured = stage.measure(layer, None)
    assert torch.equal(measured, stage.measure(layer, None))
    for row, length in enumerate(layer.lengths):
        single = alone(layer, row)
        assert torch.equal(stage.measure(single, None)[0], measured[row])
        mass = attention(widened(single, torch.float64), 8).mean(2)
        below = mass.sort(-1, descending=True).values.cumsum(-1)
        low, high = (1 + (below < tau).sum(-1).double().mean() for tau in (0.9 - 1e-5, 0.9 + 1e-5))
        assert low <= measured[row] <= min(high, length)


@pytest.mark.parametrize("inner", ["snapkv_w8", "h2o", "tova", "streaming_llm"])
def test_two_cuts_equal_one(inner, device):
    """The early cut to the upper bound and the second cut keep what one cut to the final budget would, row by row."""
    layers, lengths = 5, [120, 77]
    name, parameters = ("snapkv", {"window": 8}) if inner == "snapkv_w8" else (inner, {})
    method = create("zigzagkv", inner=create(name, budget=0.5, **parameters), budget=40, window=8, beta=0.3)
    pipeline = Pipeline(method.stages(), layers)
    assert pipeline.queries >= 8  # the budget's own, also where the score looks at none
    states = [prompt(lengths, index=i, num_layers=layers, device=device) for i in range(layers)]
    for state, peak in zip(states, (0.1, 0.5, 1.0, 2.0, 3.0)):
        state.queries *= peak  # from flat to sharp attention
    stores = [pipeline.compress(state) for state in states]
    for row in range(2):
        counts = [store.lengths[row] for store in stores]
        assert sum(counts) == layers * 40
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1]
        for state, store, count in zip(states, stores, counts):
            once = Pipeline(create(name, budget=count, **parameters).stages(), 1).compress(alone(state, row))
            assert torch.equal(kept(store, row), kept(once))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"tau": 0.0}, r"ZigZag: tau must be in \(0, 1\], got 0.0"),
        ({"beta": 1.0}, r"ZigZag: beta must be in \[0, 1\), got 1.0"),
        ({"window": 0}, "ZigZag: window must be at least 1, got 0"),
        ({"inner": "pyramidkv"}, "zigzagkv: inner must be a method with equal layer budgets, got pyramidkv"),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("zigzagkv", budget=0.5, **parameters)
