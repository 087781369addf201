"""LAVa: the score and the entropy against plain float64, layer budgets that add up, and bounds that hold."""

from __future__ import annotations

import math

import pytest
import torch

from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.ragged import kept
from tests.methods.states import DTYPES, LENGTHS, alone, attention, prompt

WINDOW, LAYERS = 8, 4


def reference(layer):
    """Scores ``[heads, prefix]`` of a row alone, float64."""
    prefix = layer.seq_len - WINDOW
    seen = attention(
        type(layer)(
            layer.index,
            layer.num_layers,
            layer.queries.double(),
            layer.keys.double(),
            layer.values.double(),
            layer.lengths,
            layer.softmax_scale,
        ),
        WINDOW,
    )
    mean = seen[..., :prefix].mean(2)
    pooled = torch.nn.functional.max_pool1d(mean, 7, 1, 3)[0]
    norm = layer.values[0, :, :prefix].double().abs().sum(-1).amax(-1)
    heads = layer.keys.shape[1]
    return (pooled.view(heads, -1, prefix) * norm[:, None, None]).amax(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_entropy(dtype, device):
    layer = prompt(LENGTHS, dtype=dtype, device=device)
    stages = create("lava", budget=0.5, window=WINDOW).stages()
    scores = stages.score(layer)
    entropies = stages.budget.measure(layer, lambda: scores)
    for row, length in enumerate(LENGTHS):
        if length <= WINDOW:
            assert entropies[row] == 1  # nothing competes
            continue
        expected = reference(alone(layer, row))
        ours = scores[row, :, layer.seq_len - length : layer.seq_len - WINDOW]
        # inputs are the same rounded numbers, sums are float32
        assert torch.allclose(ours.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
        p = expected / expected.sum()
        wanted = float(-(p * p.log()).sum()) / math.log(p.numel())
        assert abs(float(entropies[row]) - wanted) < 1e-5


@pytest.mark.parametrize("budget", [38, 0.4])
def test_layers_share_the_total_by_entropy(budget, device):
    """Spread layers get more; the total is exact for each row; rows of a batch are those rows alone."""
    stages = create("lava", budget=budget, window=WINDOW).stages()
    pipeline, states, stores = Pipeline(stages, LAYERS), [], []
    for index in range(LAYERS):
        layer = prompt(LENGTHS[:3], device=device, index=index, num_layers=LAYERS)
        layer.queries *= [9.0, 0.1, 2.0, 0.5][index]  # peaked, spread
        states.append(layer)
        stores.append(pipeline.compress(layer))
    for row, length in enumerate(LENGTHS[:3]):
        sums = [sum(store.head_lengths[row]) for store in stores]
        mean = budget if isinstance(budget, int) else int(budget * length)
        assert sum(sums) == LAYERS * 2 * mean
        assert row == 2 or sums[1] > sums[0]  # a short row leaves little to tell apart
        single = Pipeline(stages, LAYERS)
        own = [single.compress(alone(layer, row)) for layer in states]
        assert [kept(store, row) for store in stores] == [kept(store) for store in own]


@pytest.mark.parametrize("truncate", [False, True])
def test_bounds_hold(truncate):
    """What the first layers are told is never less than what they end with."""
    stage = create("lava", budget=30, window=WINDOW, compat=truncate).stages().budget
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        measured = list(torch.rand(6, 1, generator=generator, dtype=torch.float64) ** 3)
        trace = [stage.settle(measured[:n], [100], floor=WINDOW, layers=6) for n in range(1, 7)]
        for earlier in trace:
            assert all(bound[0] >= last[0] for bound, last in zip(earlier, trace[-1]))
        assert sum(row[0] for row in trace[-1]) <= 6 * 30
        assert truncate or sum(row[0] for row in trace[-1]) == 6 * 30


def test_uniform_layers(device):
    stages = create("lava", budget=20, window=WINDOW, layers="uniform").stages()
    pipeline = Pipeline(stages, LAYERS)
    for index in range(LAYERS):
        store = pipeline.compress(prompt([90], device=device, index=index, num_layers=LAYERS))
        assert sum(store.head_lengths[0]) == 2 * 20


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"budget": 32}, "lava: budget must be more than the window of 32 entries, got 32"),
        ({"layers": "flat"}, 'lava: layers must be "entropy" or "uniform", got \'flat\''),
        ({"compat": True}, "lava: budget must be an int for compat, got 0.1"),
        ({"inner": "adakv"}, "lava: inner must be a method that gives all heads the same, got adakv"),
        ({"inner": "pyramidkv"}, "inner must be a method with equal layer budgets, got pyramidkv"),
        ({"inner": "keydiff"}, "score must be a mass, never negative, for EntropyShare"),
        ({"floor": 2.0}, "floor must be in"),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("lava", **{"budget": 0.1, **parameters})
