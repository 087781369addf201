"""LAVa: the score and the entropy against plain float64, layer budgets that add up, and bounds that hold."""

from __future__ import annotations

import math

import pytest
import torch

from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.ragged import kept
from tests.methods.replay.lava import frozen
from tests.methods.states import DTYPES, LENGTHS, alone, attention, prompt
from tests.reference.budget import frozen_heads, heads_of_global_list

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


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_normalised_heads(floor, device):
    """Each head weighed by what its own best hold, beside forced entries and padding."""
    heads = create("lava", budget=30, window=WINDOW, floor=floor, normalise=True, compat=True).stages().heads
    for seed in range(20):
        torch.manual_seed(seed)
        scores = torch.rand(2, 3, 60, device=device) ** torch.tensor([1.0, 4.0, 16.0], device=device)[:, None]
        scores[..., -WINDOW:], scores[1, :, :15] = torch.inf, -torch.inf
        split = heads(scores, [30, 21], layer=0).tolist()
        for row, (start, budget) in enumerate([(0, 22), (15, 13)]):
            free = scores[row, :, start:-WINDOW].cpu()
            won = heads_of_global_list(free, budget, budget, normalise=True)
            plain = heads_of_global_list(free, budget, budget, normalise=False)
            assert won != plain
            wanted = [min(round(won.count(h) * (1 - floor) + int(30 * floor)), free.shape[1]) for h in range(3)]
            assert split[row] == [WINDOW + n for n in wanted]


def test_normalised_cuts_in_the_official_order():
    """What the goldens of `normalize` are replayed with, against the order of cuts as the page tells it."""
    heads = 3
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(heads, 90, generator=generator) ** torch.tensor([1.0, 4.0, 16.0])[:, None]
        budgets = sorted(torch.randint(5, 110, (6,), generator=generator).tolist(), reverse=True)
        stages = create("lava", budget=40, window=WINDOW, floor=0.25, normalise=True, compat=True).stages()
        raised = torch.cat([scores, torch.full((heads, WINDOW), torch.inf)], 1)[None]
        held = frozen(stages, raised, budgets, 90, WINDOW)
        wanted = frozen_heads(scores, budgets, 0.25, 10)
        assert [len(head) for head in held] == [WINDOW + n for n in wanted]
        for head, positions in enumerate(held):
            best = scores[head].sort(descending=True, stable=True).indices[: wanted[head]]
            assert positions == sorted(best.tolist()) + list(range(90, 90 + WINDOW))


def test_normalised_heads_keep_to_what_they_have(device):
    """Layer by layer: at each cut a head gets what it wins there, at most what the cut before left it."""
    stages = create("lava", budget=30, window=WINDOW, normalise=True).stages()
    pipeline, states, stores = Pipeline(stages, LAYERS), [], []
    held: list[list[int]] = []
    cut_to: list[int] = []
    for index in range(LAYERS):
        state = prompt([90], device=device, index=index, num_layers=LAYERS)
        state.queries *= [9.0, 0.1, 2.0, 0.5][index]
        states.append(state)
        stores.append(pipeline.compress(state))
        measured = [stages.budget.measure(s, lambda s=s: stages.score(s)).cpu() for s in states]
        final = index + 1 == LAYERS
        bounds = [min(n, 90) for (n,) in stages.budget.settle(measured, [90], floor=WINDOW, layers=LAYERS)]
        cut_to.append(bounds[index])
        held.append([90] * len(states[index].keys[0]))
        due = [index]
        for i in sorted(range(index), key=lambda i: bounds[i] - cut_to[i]):  # most to give first
            if final or sum(cut_to) - sum(bounds) > sum(bounds) // 8:
                due.append(i)
                cut_to[i] = bounds[i]
        for i in due:
            free = stages.score(states[i])[0, :, :-WINDOW].cpu()
            won = heads_of_global_list(free, bounds[i] - WINDOW, bounds[i] - WINDOW, normalise=True)
            counts = [WINDOW + won.count(head) for head in range(len(free))]
            held[i] = [min(a, b) for a, b in zip(held[i], counts)]
        assert [store.head_lengths[0] for store in stores] == held
    assert len({tuple(counts) for counts in held}) > 1


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
