"""AdaKV: any inner method and dtype, rows of a batch, its rounding rules beside each other, and what is refused."""

from __future__ import annotations

import pytest
import torch

from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.ragged import kept
from tests.methods.states import DTYPES, LENGTHS, alone, prompt

INNER = create("snapkv", budget=20, window=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", ["snapkv", "pyramidkv", "knorm", "curdkv", "chunkkv", "h2o"])
def test_rows_of_a_batch_are_those_rows_alone(inner, dtype, device):
    made = {
        "snapkv": INNER,
        "pyramidkv": create("pyramidkv", budget=20, window=8),
        "knorm": create("knorm", budget=20, skip_layers=()),
        "chunkkv": create("chunkkv", budget=20, window=8),
    }
    method = create("adakv", budget=20, inner=made.get(inner, inner))
    layer = prompt(LENGTHS, dtype=dtype, device=device)
    store = Pipeline(method.stages(), 1).compress(layer)
    for row, length in enumerate(LENGTHS):
        assert sum(store.head_lengths[row]) == 2 * min(20, length)
        single = Pipeline(method.stages(), 1).compress(alone(layer, row))
        assert kept(store, row) == kept(single)


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
def test_rules_agree_to_a_row_a_head(floor, device):
    """The official rounding misses the exact shares by its truncated floor and a rounding, and no head goes below its floor."""
    layer = prompt([90], num_q_heads=8, num_kv_heads=4, device=device)
    layer.keys *= torch.tensor([3.0, 1.0, 0.5, 0.1], device=device)[:, None, None]
    counts = {}
    for rounding in ("exact", "official"):
        method = create("adakv", budget=20, inner=INNER, floor=floor, rounding=rounding)
        counts[rounding] = Pipeline(method.stages(), 1).compress(layer).head_lengths[0]
    assert sum(counts["exact"]) == 80
    for exact, official in zip(*counts.values()):
        assert abs(exact - official) <= 2
        assert official >= 8 + int(12 * floor)
    if floor == 1.0:
        assert counts["exact"] == [20] * 4
    else:
        assert len(set(counts["exact"])) > 1


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"floor": -0.1}, "floor must be in"),
        ({"rounding": "up"}, "rounding must be"),
        ({"skip": -1}, "skip must be at least 0"),
        ({"inner": "streaming_llm"}, "when must be Prefill for heads of different counts"),
        (
            {"inner": "keydiff", "normalise": True},
            "score must be a mass, never negative, for heads that are normalised",
        ),
        ({"inner": "lava"}, "inner must be a method that gives all heads the same, got lava"),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("adakv", **{"budget": 0.1, **parameters})
