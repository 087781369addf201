"""PrefixKV: shared column sums, one mass threshold over all layers, tables."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.budget import PrefixMass, Table, cumulative_mass, prefix_lengths
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.states import DTYPES, LENGTHS, alone, assert_scores, attention, kept, prompt


def column_sums(layer):
    return attention(layer).sum(2).mean(1, keepdim=True).expand(-1, layer.keys.shape[1], -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(dtype, device):
    score = create("prefixkv", budget=0.5).stages().score
    assert_scores(score, column_sums, prompt(LENGTHS, dtype=dtype, device=device))


def test_worked_example():
    sharp = [0.5, 0.3, 0.1, 0.05, 0.01, 0.01, 0.01, 0.01, 0.01, 0.0]
    held = cumulative_mass(torch.tensor([sharp, [0.1] * 10]))
    settled = PrefixMass(5, forced=2).settle(list(held[:, None]), [10], floor=2)
    assert settled == [[3], [7]]


@settings(deadline=None)
@given(data=st.data(), layers=st.integers(1, 6), total=st.integers(0, 80))
def test_prefixes_are_the_smallest_of_all(data, layers, total):
    """The `total` entries with the least mass before them, of all layers; ties to the lower layer."""
    masses = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=15), min_size=layers, max_size=layers))
    curves = []
    for mass in masses:
        ordered = np.sort(mass)[::-1]
        curves.append((np.cumsum(ordered) - ordered) / max(sum(mass), 1))
    total = min(total, sum(map(len, curves)))
    entries = sorted((value, layer, i) for layer, curve in enumerate(curves) for i, value in enumerate(curve))
    expected = [0] * layers
    for _, layer, _ in entries[:total]:
        expected[layer] += 1
    assert prefix_lengths(curves, total) == expected


@settings(deadline=None, max_examples=60)
@given(
    layers=st.integers(1, 8),
    length=st.integers(1, 120),
    budget=st.one_of(st.integers(1, 100), st.floats(0.01, 1)),
    seed=st.integers(0, 2**31),
)
def test_meets_its_total_and_its_bound(layers, length, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    peaks = 4 * torch.rand(layers, 1, generator=generator)
    scores = (peaks * torch.randn(layers, length, generator=generator)).exp()
    stage = PrefixMass(budget, forced=2)
    settled = [row[0] for row in stage.settle(list(cumulative_mass(scores)[:, None]), [length], floor=2)]
    mean = budget if isinstance(budget, int) else max(1, int(budget * length))
    assert sum(settled) == layers * min(max(mean, 2), length)
    (bound,) = stage.first(SimpleNamespace(num_layers=layers, lengths=[length]), None)
    assert max(settled) <= max(bound, 2)
    held = list(cumulative_mass(scores)[:, None])
    earlier = None
    for count in range(1, layers + 1):  # layer by layer: bounds that only come down, and no more than the total
        bounds = [row[0] for row in stage.settle(held[:count], [length], floor=2, layers=layers)]
        assert earlier is None or all(now <= then for now, then in zip(bounds, earlier))
        assert sum(bounds) <= max(layers * mean, layers * min(2, length))
        earlier = bounds
    assert earlier == settled


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_cuts_and_padded_rows(dtype, device):
    """The budgets of each row alone, and the entries that one cut to them would keep."""
    lengths, layers = [90, 41], 4
    method = create("prefixkv", budget=0.3)
    together, apart = Pipeline(method.stages(), layers), [Pipeline(method.stages(), layers) for _ in lengths]
    stores, singles, states = [], [[], []], []
    for index in range(layers):
        state = prompt(lengths, index=index, num_layers=layers, dtype=dtype, device=device)
        state.queries *= (0.1, 0.5, 1.0, 2.0)[index]
        states.append(state)
        stores.append(together.compress(state))
        for row, pipeline in enumerate(apart):
            singles[row].append(pipeline.compress(alone(state, row)))
    for row, length in enumerate(lengths):
        counts = [store.lengths[row] for store in stores]
        assert sum(counts) == layers * int(0.3 * length)
        assert counts[0] > counts[-1]
        for state, store, single in zip(states, stores, singles[row]):
            positions = kept(store, row)
            assert torch.equal(positions, kept(single))
            assert torch.equal(positions[:1].expand_as(positions), positions)
            scores = method.stages().score(alone(state, row))[0, 0, 1:-1]
            best = scores.sort(descending=True, stable=True).indices[: positions.shape[1] - 2].sort().values + 1
            assert positions[0].tolist() == [0, *best.tolist(), length - 1]


def test_table(tmp_path, device):
    path = tmp_path / "keep.json"
    path.write_text(json.dumps({"keep": [0.9, 0.25, 0.05]}))
    pipeline = Pipeline(create("prefixkv", budget=0.4, table=str(path)).stages(), 3)
    for index, counts in enumerate([[90, 37, 1], [25, 10, 1], [5, 2, 1]]):  # 75 of 100, 30.75 of 41 are dropped
        store = pipeline.compress(prompt([100, 41, 1], index=index, num_layers=3, device=device))
        assert store.lengths == counts
    with pytest.raises(ValueError, match="Table: keep must have a share for each of 4 layers, got 3"):
        pipeline.compress(prompt([100], index=0, num_layers=4, device=device))
    with pytest.raises(ValueError, match=r"prefixkv: budget must be the mean share of the table \(0.400\), got 0.5"):
        create("prefixkv", budget=0.5, table=str(path))
    with pytest.raises(ValueError, match=r"prefixkv: budget must be the mean share of the table \(0.400\), got 40"):
        create("prefixkv", budget=40, table=str(path))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"keep": [0.5, 0]}', '{"keep": ["x"]}', '{"keep": []}', '{"keep": 3}', None]
)
def test_refused_tables(text, tmp_path):
    path = tmp_path / "keep.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="prefixkv: table must be a JSON file"):
        create("prefixkv", budget=0.5, table=str(path))


def test_table_refused():
    with pytest.raises(ValueError, match="Table: keep must be a share in"):
        Table((0.5, 1.5))
