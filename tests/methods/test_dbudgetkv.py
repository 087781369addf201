"""DBudgetKV: the stop rule on the attention norm."""

from __future__ import annotations

import pytest
import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from tests.methods.states import (
    DTYPES,
    LENGTHS,
    alone,
    assert_padded_rows_equal_those_rows_alone,
    attention,
    compress,
    kept,
    prompt,
    widened,
)


@pytest.mark.parametrize(("threshold", "dropped"), [(0.05, 2), (0.02, 0), (0.0, 0), (0.147, 2), (0.148, 3), (0.99, 3)])
def test_worked_example(threshold, dropped, device):
    weights = torch.tensor([0.1, 0.1, 0.1, 0.1 - 0.2 + 0.1, 0.1, 0.1, 0.2, 0.4], device=device)  # 4 sinks first
    keys = torch.zeros(1, 1, 8, 8, device=device)
    keys[..., 0] = weights.clamp(min=1e-30).log()
    queries = torch.zeros(1, 1, 1, 8, device=device)
    queries[..., 0] = 1
    store = compress(create("dbudgetkv", threshold=threshold), LayerState(0, 1, queries, keys, keys, [8], 1.0))
    assert kept(store)[0].tolist() == [0, 1, 2, 3, *range(4 + dropped, 8)]


def needed(layer, candidates, order, threshold, observed=1, causal=True):
    """The least number of candidates, best first, by brute force in float64; and how near the rule was to another."""
    rows = attention(widened(layer, torch.float64), observed)
    if not causal:
        keys = layer.keys.double().repeat_interleave(rows.shape[1] // layer.keys.shape[1], 1)
        rows = (layer.queries[:, :, -observed:].double() @ keys.mT * layer.softmax_scale).softmax(-1)
    row = rows.mean(2)[0, :, candidates].gather(1, order)
    norms = row.square().cumsum(-1).sqrt().mean(0)
    lost = (norms[-1] - norms) / norms[-1]
    return 1 + int((lost > threshold).sum()), (lost - threshold).abs().min()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("observed", "causal"), [(0.0, True), (0.2, True), (0.2, False)])
def test_position(observed, causal, dtype, device):
    method = create("dbudgetkv", threshold=0.1, observed=observed, causal=causal)
    layer = prompt([90, 90, 41], dtype=dtype, device=device)
    store = compress(method, layer)
    for row, length in enumerate(layer.lengths):
        single, rows = alone(layer, row), max(int(length * observed), 1)
        newest = torch.arange(length - 5, -1, -1, device=device).expand(4, -1)
        count, margin = needed(single, slice(4, None), newest, 0.1, rows, causal)
        assert margin > 1e-5  # else the case tells nothing
        assert store.lengths[row] == 4 + count
        assert kept(store, row)[0].tolist() == [0, 1, 2, 3, *range(length - count, length)]


def test_any_order(device):
    inner = create("h2o", budget=0.5, recent=3, group_reduce="none")
    layer = prompt([70], device=device)
    store = compress(create("dbudgetkv", inner=inner, threshold=0.2), layer)
    order = inner.stages().score(layer)[0, :, :67].sort(dim=-1, descending=True, stable=True).indices
    count, margin = needed(layer, slice(0, 67), order, 0.2)
    assert margin > 1e-5
    assert store.lengths == [3 + count]
    for head in range(4):
        assert kept(store)[head].tolist() == [*order[head, :count].sort().values.tolist(), 67, 68, 69]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [{}, {"observed": 0.3}, {"inner": "h2o"}, {"inner": "tova", "budget": 0.5}])
def test_padded_rows(parameters, dtype, device):
    if parameters.get("inner") == "h2o":
        parameters = {"inner": create("h2o", budget=0.5, recent=5)}
    method = create("dbudgetkv", threshold=0.1, **parameters)
    assert_padded_rows_equal_those_rows_alone(method, prompt(LENGTHS, dtype=dtype, device=device))


def test_budget_bounds_what_is_kept(device):
    layer = prompt([80], device=device)
    assert compress(create("dbudgetkv", budget=30, threshold=0.0), layer).lengths == [30]
    assert compress(create("dbudgetkv", budget=2, threshold=0.0), layer).lengths == [4]


def test_no_attention_at_all(device):
    layer = prompt([40], device=device)
    layer.keys[:, :, 0], layer.keys[:, :, 1:] = 0, 0
    layer.queries[:, :, -1] = 1
    layer.keys[:, :, 0] = 1000  # the sink takes it all: nothing left to lose
    assert compress(create("dbudgetkv"), layer).lengths == [5]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"threshold": 1.0}, r"NormDrop: threshold must be in \[0, 1\), got 1.0"),
        ({"observed": 1.5}, "NormDrop: observed must be a share in"),
        ({"inner": "h2o"}, "dbudgetkv: inner must force a fixed number of entries, got TopKRecent"),
        ({"inner": "pyramidkv"}, "dbudgetkv: inner must be a method with equal layer budgets"),
        ({"sink": -1}, "TopK: sink must be at least 0"),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("dbudgetkv", **parameters)
