"""KeyDiff: scores, and the block form against a loop over lists."""

from __future__ import annotations

import pytest
import torch

from kvcompress.difference import key_difference
from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.scoring import DTYPES, LENGTHS, check, layer, widened


def difference(keys):
    unit = keys / keys.norm(dim=-1, keepdim=True)
    anchor = unit.mean(2, keepdim=True)
    return -(unit * anchor / anchor.norm(dim=-1, keepdim=True)).sum(-1)


def reference(state: LayerState):
    return difference(state.keys)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(dtype, device):
    score = create("keydiff", budget=0.5).stages().score
    check(score, reference, layer(LENGTHS, dtype=dtype, device=device))
    check(score, reference, layer([2500, 2500], dtype=dtype, device=device))  # more than one chunk


def test_zero_keys_score_zero(device):
    keys = torch.zeros(1, 1, 5, 8, device=device)
    assert torch.equal(key_difference(keys), torch.zeros(1, 1, 5, device=device))
    keys[0, 0, 3] = 1.0
    assert key_difference(keys)[0, 0].tolist() == pytest.approx([0, 0, 0, -1, 0])


def kept_in_blocks(keys, kept, block):
    """One head [n, head_dim]: the loop of the paper, over Python lists."""
    held = list(range(min(kept, len(keys))))
    for start in range(kept, len(keys), block):
        held += range(start, min(start + block, len(keys)))
        scores = difference(keys[held][None, None])[0, 0].tolist()
        best = sorted(range(len(held)), key=lambda i: (-scores[i], i))[:kept]
        held = [held[i] for i in sorted(best)]
    return held


@pytest.mark.parametrize("block", [1, 7, 32, 500])
@pytest.mark.parametrize("budget", [20, 0.4])
def test_blocks(block, budget, device):
    state = layer([90, 61, 12], dtype=torch.float32, device=device)
    method = create("keydiff", budget=budget, block_size=block)
    store = Pipeline(method.stages(), 1).compress(state)
    for b in range(3):
        keys = widened(state, b, torch.float64).keys[0]
        for head in range(2):
            kept = kept_in_blocks(keys[head], store.lengths[b], block)
            assert store.positions[b, head, : store.lengths[b]].tolist() == kept


def test_larger_cut_takes_back_what_went_last(device):
    """The top n of the block scores are nested: a second cut from more entries ends where one cut would."""
    score = create("keydiff", budget=20, block_size=16).stages().score
    scores = score(layer([100], dtype=torch.float32, device=device))[0]
    order = scores.argsort(-1, descending=True)
    smaller = create("keydiff", budget=20, block_size=16, sink=2)
    assert smaller.stages().score == score
    assert (scores.gather(1, order[:, :20]).amin(1) >= -1).all()  # all of the last round
    assert (scores.gather(1, order[:, 36:37]) < -1).all()  # candidates of the last round: 20 + 16


def test_refused():
    with pytest.raises(ValueError, match="keydiff: block_size must be at least 1, got 0"):
        create("keydiff", budget=0.5, block_size=0)
