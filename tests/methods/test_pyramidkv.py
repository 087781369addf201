"""PyramidKV: the line of layer budgets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.budget import Pyramid
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.replay.pyramidkv import layer_counts
from tests.methods.states import DTYPES, LENGTHS, alone, kept, prompt


@settings(deadline=None, max_examples=80)
@given(
    layers=st.integers(1, 40),
    length=st.integers(1, 3000),
    budget=st.one_of(st.integers(1, 3000), st.floats(0.01, 1)),
    window=st.integers(0, 40),
    beta=st.integers(1, 40),
)
def test_exact_line(layers, length, budget, window, beta):
    stage = Pyramid(budget, window, beta=beta)
    counts = layer_counts(stage, layers, length)
    mean = budget if isinstance(budget, int) else max(1, int(budget * length))
    assert sum(counts) == layers * min(max(mean, window), length)
    assert all(a >= b - 1 for a, b in itertools.pairwise(counts))
    if window < mean < length:
        base = mean - window
        low = max(base / beta, 2 * base - (length - window))
        assert abs(counts[-1] - window - (low if layers > 1 else base)) <= 1
        steps = [a - b for a, b in itertools.pairwise(counts)]
        assert max(steps, default=0) - min(steps, default=0) <= 2  # a line, rounded


def test_worked_example():
    official = Pyramid(100, 16, allocation="official")
    assert layer_counts(official, 4, 500) == [180, 127, 74, 21]
    assert layer_counts(Pyramid(100, 16), 4, 500) == [180, 127, 73, 20]  # 163.8, 110.6, 57.4, 4.2 and the window


def test_each_row_has_its_own_line(device):
    stage, lengths, layers = Pyramid(0.5, 8), [400, 100, 13, 2], 5
    for index in range(layers):
        counts = stage.first(prompt(lengths, index=index, num_layers=layers, device=device), None)
        assert [min(a, b) for a, b in zip(counts, lengths)] == [layer_counts(stage, layers, n)[index] for n in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_rows(dtype, device):
    method, layers = create("pyramidkv", budget=0.4, window=4), 4
    together, apart = Pipeline(method.stages(), layers), [Pipeline(method.stages(), layers) for _ in LENGTHS]
    for index in range(layers):
        state = prompt(LENGTHS, index=index, num_layers=layers, dtype=dtype, device=device)
        store = together.compress(state)
        for row, pipeline in enumerate(apart):
            single = pipeline.compress(alone(state, row))
            assert torch.equal(kept(store, row), kept(single)), (index, row)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"beta": 0}, "Pyramid: beta must be at least 1, got 0"),
        ({"allocation": "other"}, 'Pyramid: allocation must be "exact", "official", "kvpress" or "adakv", got'),
        ({"budget": 8}, "pyramidkv: budget must be more than the window of 8 entries, got 8"),
        ({"budget": math.nan}, "entries: budget must be"),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("pyramidkv", **{"budget": 0.5, **parameters})
