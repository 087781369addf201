"""Knorm: scores, spared layers and prompts, rounding."""

from __future__ import annotations

import pytest
import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.scoring import DTYPES, LENGTHS, check, layer


def reference(state: LayerState):
    return -state.keys.square().sum(-1).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(dtype, device):
    score = create("knorm", budget=0.5).stages().score
    check(score, reference, layer(LENGTHS, dtype=dtype, device=device))
    check(score, reference, layer([2500, 2500], dtype=dtype, device=device))  # more than one chunk


def test_worked_example(device):
    keys = torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]], device=device)[None, None]
    state = LayerState(0, 1, None, keys, keys, [4], 1.0)
    for budget, kept in ((0.5, [1, 2]), (0.51, [1, 2, 3])):
        method = create("knorm", budget=budget, skip_layers=(), rounding="ceil")
        store = Pipeline(method.stages(), 1).compress(state)
        assert store.positions[0, 0, : store.max_length].tolist() == kept


def test_spared_layers_and_prompts(device):
    pipeline = Pipeline(create("knorm", budget=0.5, skip_layers=(0, 2), prune_after=40).stages(), 4)
    for index, lengths in enumerate([[70, 70, 33, 1], [35, 35, 33, 1], [70, 70, 33, 1], [35, 35, 33, 1]]):
        state = layer([70, 70, 33, 1], dtype=torch.float32, device=device, index=index)
        assert pipeline.compress(state).lengths == lengths


def test_rounding():
    state = layer([100], dtype=torch.float32, device="cpu", index=3)
    kept = {r: create("knorm", budget=0.07, rounding=r).stages().budget.first(state, None) for r in ("floor", "ceil")}
    assert kept == {"floor": [7], "ceil": [8]}  # 0.07 * 100 is 7.000000000000001


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"skip_layers": (-1,)}, "knorm: skip_layers must be layers counted from 0, got"),
        ({"prune_after": -1}, "knorm: prune_after must be at least 0, got -1"),
        ({"rounding": "even"}, 'knorm: rounding must be "floor" or "ceil", got \'even\''),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("knorm", budget=0.5, **parameters)
