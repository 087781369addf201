"""Compactor: the pieces and scores in every form, accounting, and the calibrated budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvcompress.calibrated import Calibrated, calibrated_keep, fit_quality, predicted_quality
from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.ragged import kept
from tests.methods.scoring import DTYPES, LENGTHS, check, layer
from tests.reference.rotary import rope


def z_score(x):
    return (x - x.mean()) / x.std(correction=0).clamp_min(1e-6)


def reference_of(score):
    def leverage(state: LayerState, first: int, last: int):
        keys = rope(state.keys, -torch.arange(state.seq_len, device=state.device), state.inv_freq)[:, :, first:last]
        x = keys @ score.projection(keys.shape[-1]).to(keys)
        out = []
        for block in x.split(score.leverage_block or x.shape[2], 2):
            block = block - block.mean(2, keepdim=True)
            gram = block.mT @ block + score.regulariser * torch.eye(block.shape[-1]).to(block)
            out.append(z_score(((block @ torch.linalg.inv(gram)) * block).sum(-1)))
        return torch.cat(out, 2)

    def attention(state: LayerState, first: int, last: int):
        group = state.queries.shape[1] // state.keys.shape[1]
        scale = state.softmax_scale if score.logit_scale is None else score.logit_scale
        keys = state.keys.repeat_interleave(group, 1)
        out = []
        for start in range(first, last, score.chunk):
            span = slice(start, min(start + score.chunk, last))
            logits = state.queries[:, :, span] @ keys[:, :, span].mT * scale
            width, extra = span.stop - start, 0
            if score.tail == "kvpress":
                extra = score.chunk - width
                logits = torch.nn.functional.pad(logits, (0, extra))
            elif score.tail == "official" and width < score.chunk:
                extra = -width % 64
            received = logits.softmax(-1).sum(2)[..., :width] + extra / score.chunk
            out.append(received.unflatten(1, (-1, group)).sum(2))
        received = torch.cat(out, 2)
        if score.value_norm:
            received = received * state.values[:, :, first:last].norm(dim=-1)
        edge = score.kernel_size // 2
        return z_score(torch.nn.functional.pad(received, (edge, edge)).unfold(2, score.kernel_size, 1).mean(-1))

    def reference(state: LayerState):
        batch, heads, length, _ = state.keys.shape
        scores = torch.full((batch, heads, length), torch.inf, dtype=state.keys.dtype, device=state.device)
        if length > score.sink + score.window:
            span = (score.sink, length - score.window) if score.protected == "unscored" else (0, length)
            scores[:, :, slice(*span)] = attention(state, *span) + score.blend * leverage(state, *span)
            scores[:, :, : score.sink] = scores[:, :, length - score.window :] = torch.inf
        return scores

    return reference


SMALL = {"sink": 3, "window": 5, "chunk": 16, "leverage_block": 32, "sketch": 8}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "parameters",
    [
        SMALL,
        {**SMALL, "tail": "official", "logit_scale": None, "kernel_size": 3},
        {**SMALL, "tail": "kvpress", "protected": "unscored", "value_norm": True, "leverage_block": None},
        {**SMALL, "sink": 0, "window": 0, "blend": 0.7},
        {},
    ],
)
def test_scores(parameters, dtype, device):
    score = create("compactor", budget=0.5, **parameters).stages().score
    for lengths in (LENGTHS, [1500]):  # the second: more than one group of blocks
        state = layer(lengths, dtype=dtype, device=device)
        state.queries *= 0.2  # no 1 / sqrt(d): keeps the softmax from one winner
        check(score, reference_of(score), state)


def test_equal_keys_score_by_attention_only(device):
    state = layer([40], dtype=torch.float32, device=device)
    state.keys[:] = 1.0
    state.inv_freq = torch.zeros_like(state.inv_freq)
    scores = create("compactor", budget=0.5, **SMALL).stages().score(state)
    assert scores[:, :, 3:35].abs().max() < 0.01  # equal keys: no spread, neither of leverage nor of attention


@pytest.mark.parametrize(("accounting", "kept"), [("outside", [20 + 45, 20 + 15, 20]), ("inside", [55, 25, 20])])
def test_accounting(accounting, kept, device):
    method = create("compactor", budget=0.5, sink=4, window=16, accounting=accounting)
    store = Pipeline(method.stages(), 1).compress(layer([110, 50, 20], dtype=torch.float32, device=device))
    assert store.lengths == kept
    for row, length in enumerate([110, 50, 20]):
        positions = store.positions[row, 0, : kept[row]].tolist()
        assert set(positions) >= {*range(4), *range(length - 16, length)}
    exact = create("compactor", budget=30, sink=4, window=16, accounting=accounting)
    store = Pipeline(exact.stages(), 1).compress(layer([110, 50, 20], dtype=torch.float32, device=device))
    assert store.lengths == [30, 30, 20]  # a count is a count


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"tail": "none"}, 'compactor: tail must be "exact", "official" or "kvpress", got \'none\''),
        ({"protected": "no"}, 'compactor: protected must be "scored" or "unscored", got \'no\''),
        ({"accounting": "both"}, 'compactor: accounting must be "outside", "inside" or "official", got \'both\''),
        ({"heads": "all"}, 'compactor: heads must be "equal" or "layer", got \'all\''),
        ({"page_size": 16}, 'compactor: page_size must be at least 1, and 1 unless heads is "layer", got 16'),
        ({"kernel_size": 2}, "compactor: kernel_size must be odd, got 2"),
        ({"chunk": 0}, "compactor: chunk must be at least 1, got 0"),
        ({"regulariser": 0.0}, "compactor: regulariser must be above 0, got 0.0"),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("compactor", budget=0.5, **parameters)


# --- the calibrated budget


def test_worked_examples():
    shares = calibrated_keep([-3.0, -8.0, 2.0, 0.0], 1.0, 0.0, 0.95)
    assert shares.round(4).tolist() == [0.7767, 0.3737, 0.9779, 0.95]


@pytest.mark.parametrize("b", [-900.0, -30.0, -3.0, -1e-5, 0.0, 1e-5, 2.0, 40.0, 900.0])
def test_curve(b):
    keep = np.linspace(0, 1, 101)
    curve = predicted_quality(keep, b, 1.0, 0.0)
    assert curve[0] == 0
    assert curve[-1] == 1
    assert (np.diff(curve) >= 0).all()
    back = calibrated_keep(np.full(99, b), 1.0, 0.0, 0.9)[0]
    assert predicted_quality(back, b, 1.0, 0.0) == pytest.approx(0.9, rel=1e-6)


def test_fit():
    random = np.random.default_rng(0)
    keep, nll = random.uniform(0.05, 1, 300), random.uniform(1, 4, 300)
    exact = predicted_quality(keep, nll, -1.5, 0.7)
    assert fit_quality(keep, nll, exact) == pytest.approx((-1.5, 0.7), abs=1e-5)
    noisy = exact + random.normal(0, 0.05, 300)
    plain, careful = (fit_quality(keep, nll, noisy, caution=caution) for caution in (1.0, 20.0))
    assert plain == pytest.approx((-1.5, 0.7), abs=0.4)
    assert (calibrated_keep(nll, *careful, 0.9) > calibrated_keep(nll, *plain, 0.9)).all()
    assert fit_quality(keep, nll, noisy) == fit_quality(keep, nll, noisy)


def test_calibrated_budget(device):
    stages = create("compactor", budget=1.0, **SMALL).stages()
    state = layer([70, 70, 33, 1], dtype=torch.float32, device=device)
    budget = Calibrated(nll=(3.0, 8.0, 3.0, 3.0), alpha=-1.0, beta=0.0)
    store = Pipeline(replace(stages, budget=budget), 1).compress(state)
    assert store.lengths == [55, 27, 26, 1]  # ceil of 0.7767 * 70, 0.3737 * 70, 0.7767 * 33
    assert Calibrated(8.0, -1.0, 0.0, least=0.5).first(state, None) == [35, 35, 17, 1]
    with pytest.raises(ValueError, match=r"Calibrated: nll must be one number or one a row \(4\), got 2"):
        Calibrated((1.0, 2.0), -1.0, 0.0).first(state, None)
    with pytest.raises(ValueError, match=r"quality must be in \(0, 1\], got 1.5"):
        Calibrated(1.0, -1.0, 0.0, quality=1.5)
    with pytest.raises(ValueError, match="least must be in"):
        Calibrated(1.0, -1.0, 0.0, least=-0.1)


def test_fit_refused():
    with pytest.raises(ValueError, match="must be lists of one length, at least 2"):
        fit_quality([0.5], [1.0], [0.9])
    with pytest.raises(ValueError, match="must be finite"):
        fit_quality([0.5, 0.6], [1.0, np.nan], [0.9, 0.8])
    with pytest.raises(ValueError, match="caution must be at least 1"):
        fit_quality([0.5, 0.6], [1.0, 2.0], [0.9, 0.8], caution=0.5)


@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize("accounting", ["inside", "outside", "official"])
def test_best_of_a_layer(accounting, page_size, device):
    """The best scores of all heads in one list, the protected ones first; pages are filled with a head's next best."""
    state = layer([90, 41], dtype=torch.float32, device=device)
    method = create(
        "compactor",
        budget=0.4,
        heads="layer",
        accounting=accounting,
        page_size=page_size,
        sink=3,
        window=5,
        chunk=16,
        leverage_block=32,
        sketch=8,
    )
    stages = method.stages()
    scores = stages.score(state)
    store = Pipeline(stages, 1).compress(state)
    heads = scores.shape[1]
    for row, length in enumerate([90, 41]):
        quota = {
            "inside": heads * int(0.4 * length),
            "outside": heads * (8 + int(0.4 * (length - 8))),
            "official": round(0.4 * (length - 8) * heads),
        }[accounting]
        own = scores[row, :, state.seq_len - length :].cpu()
        best = own.flatten().argsort(descending=True, stable=True)[:quota]
        won = torch.bincount(best // length, minlength=heads)
        wanted = (-(-won // page_size) * page_size).clamp_max(length).tolist()
        assert store.head_lengths[row] == wanted
        for head, held in enumerate(kept(store, row)):
            assert held == own[head].argsort(descending=True, stable=True)[: wanted[head]].sort().values.tolist()
            assert {0, 1, 2, *range(length - 5, length)} <= set(held)
