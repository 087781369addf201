"""CurDKV: scores in every form."""

from __future__ import annotations

import pytest
import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from tests.methods.scoring import DTYPES, LENGTHS, check, layer


def reference_of(score):
    def energy(rows):
        g = score.projection(rows.shape[-1])
        energy = (rows if g is None else rows @ g.to(rows)).square().sum(-1)
        if score.local_window is None:
            return energy
        length, width = energy.shape[2], score.local_window
        first = 0 if score.pad == "back" or length % width == 0 else length % width - width
        for start in range(first, length, width):
            span = slice(max(start, 0), start + width)
            energy[:, :, span] = energy[:, :, span].clone() / energy[:, :, span].sum(2, keepdim=True)
        return energy

    def reference(state: LayerState):
        key, value = energy(state.keys), energy(state.values)
        combined = {"key": key, "value": value, "kv_avg": (key + value) / 2, "kv_product": key * value}[score.combine]
        combined = combined / combined.sum(2, keepdim=True)
        combined[:, :, : score.sink] = torch.inf
        return combined

    return reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"pad": "front"},
        {"local_window": 7, "combine": "kv_avg"},
        {"local_window": 7, "pad": "front", "combine": "key"},
        {"local_window": None, "combine": "value", "sketch": 20, "sink": 0},
        {"local_window": 500, "sketch": 64, "seed": 3},
    ],
)
def test_scores(parameters, dtype, device):
    score = create("curdkv", budget=0.5, **parameters).stages().score
    for lengths in (LENGTHS, [64, 64], [2500, 2500]):  # the last: more than one chunk
        check(score, reference_of(score), layer(lengths, dtype=dtype, device=device))


def test_zeros_score_zero(device):
    state = layer([40], dtype=torch.float32, device=device)
    state.values[:, :, 16:32] = 0
    scores = create("curdkv", budget=0.5).stages().score(state)
    assert (scores[:, :, 16:32] == 0).all()
    state.keys.zero_()
    assert (create("curdkv", budget=0.5).stages().score(state)[:, :, 4:] == 0).all()


def test_sketch_is_right_in_expectation():
    """E |k G|^2 = |k|^2: over 4000 columns the relative deviation has a standard deviation of sqrt(2 / 4000)."""
    state = layer([50], dtype=torch.float32, device="cpu")
    exact, sketched = (
        create("curdkv", budget=0.5, combine="key", local_window=None, sink=0, sketch=columns).stages().score(state)
        for columns in (None, 4000)
    )
    assert ((sketched / exact).log().abs() < 6 * (2 / 4000) ** 0.5).all()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"combine": "both"}, 'curdkv: combine must be "key", "value", "kv_avg" or "kv_product", got \'both\''),
        ({"pad": "left"}, 'curdkv: pad must be "back" or "front", got \'left\''),
        ({"sketch": 0}, "curdkv: sketch must be at least 1 or None, got 0"),
        ({"local_window": 0}, "curdkv: local_window must be at least 1 or None, got 0"),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("curdkv", budget=0.5, **parameters)
