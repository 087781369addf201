"""OBCache: the scores are squared first-order changes of the attention output."""

from __future__ import annotations

import pytest
import torch
from torch.func import jvp
from torch.nn.functional import avg_pool1d, max_pool1d

import kvcompress.score
from kvcompress.layer import ALL_QUERIES
from kvcompress.methods import create
from kvcompress.score import attention_output
from tests.methods.states import (
    DTYPES,
    LENGTHS,
    alone,
    assert_padded_rows_equal_those_rows_alone,
    assert_scores,
    attention,
    compress,
    kept,
    prompt,
    widened,
)

KINDS = ["value", "key", "joint"]


def formula(kind, window=8, recent=8, pool="none", group=True):
    """The page's formulas on the full map, in the layer's dtype; with the output as attention rounded it, if given."""

    def score(layer, output=None):
        rows = min(window or layer.seq_len, layer.seq_len)
        repeats = layer.queries.shape[1] // layer.keys.shape[1]
        keys, values = (t.repeat_interleave(repeats, 1) for t in (layer.keys, layer.values))
        weights = attention(layer, rows)
        logits = layer.queries[:, :, -rows:] @ keys.mT * layer.softmax_scale
        output = weights @ values if output is None else output[:, :, -rows:].to(values.dtype)
        square = values.square().sum(-1)[:, :, None]
        along = output @ values.mT
        value = weights.square() * square
        key = (weights * logits).square() * (square + output.square().sum(-1, keepdim=True) - 2 * along)
        cross = 2 * weights.square() * logits * (square - along)
        total = {"value": value, "key": key, "joint": value + key + cross}[kind].sum(2)
        if group:
            total = total.unflatten(1, (layer.keys.shape[1], -1)).sum(2)
        cut = layer.seq_len - recent
        if pool != "none" and cut > 0:
            function = avg_pool1d if pool == "avg" else max_pool1d
            total = torch.cat([function(total[..., :cut], 7, stride=1, padding=3), total[..., cut:]], -1)
        return total

    return score


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_squared_change_of_the_output(kind):
    """Against derivatives: keys and values of one entry shrink, the outputs of the observing queries move."""
    given = prompt([14], num_q_heads=2, num_kv_heads=1, head_dim=8)
    layer = widened(given, torch.float64)
    position = torch.arange(14)

    def output(keys, values):
        logits = layer.queries[:, :, -4:] @ keys.mT * layer.softmax_scale
        return logits.masked_fill(position > position[-4:, None], -torch.inf).softmax(-1) @ values

    scores = create("obcache", budget=8, kind=kind, window=4).stages().score(given)
    for j in range(14):
        only = (position == j)[:, None]
        shrink = (layer.keys * only * (kind != "value"), layer.values * only * (kind != "key"))
        _, change = jvp(output, (layer.keys, layer.values), shrink)
        assert scores[0, 0, j].item() == pytest.approx(change.square().sum().item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores(kind, dtype, device):
    layer = prompt(LENGTHS, dtype=dtype, device=device)
    for window in (8, None):
        score = create("obcache", budget=20, kind=kind, window=window, recent=8).stages().score
        output, _ = attention_output(layer, layer.window(window or ALL_QUERIES))
        assert_scores(score, formula(kind, window), layer, lambda row, o=output: {"output": o[row : row + 1]})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 8, 90])
def test_attention_output(window, dtype, device):
    """Against float64: half an ulp of the dtype beside float32's own error; the log-sum-exp likewise."""
    layer = prompt(LENGTHS, dtype=dtype, device=device)
    output, lse = attention_output(layer, layer.queries[:, :, -window:])
    assert output.dtype == dtype
    for row, length in enumerate(layer.lengths):
        single = widened(alone(layer, row), torch.float64)
        rows = min(window, length)
        keys, values = (t.repeat_interleave(2, 1) for t in (single.keys, single.values))
        exact = attention(single, rows) @ values
        error = (output[row, :, -rows:].double() - exact[0]).abs()
        assert (error <= exact[0].abs() * torch.finfo(dtype).eps / 2 + 1e-5 * values.abs().max()).all()
        position = torch.arange(length, device=device)
        logits = single.queries[:, :, -rows:] @ keys.mT * single.softmax_scale
        total = logits.masked_fill(position > position[-rows:, None], -torch.inf).logsumexp(-1)
        assert torch.allclose(lse[row, :, -rows:].double(), total[0], rtol=1e-5, atol=1e-5)
        assert torch.isposinf(lse[row, :, : window - rows]).all()
        assert (output[row, :, : window - rows] == 0).all()


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("group_reduce", ["sum", "none"])
def test_pools(pool, group_reduce, device):
    score = create("obcache", budget=20, window=8, pool=pool, group_reduce=group_reduce).stages().score
    assert_scores(score, formula("joint", pool=pool, group=group_reduce == "sum"), prompt(LENGTHS, device=device))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_change_nothing(kind, device, monkeypatch):
    layer = prompt([90, 41], device=device)
    score = create("obcache", budget=20, kind=kind, window=None, recent=8).stages().score
    whole = score(layer)
    monkeypatch.setattr(kvcompress.score, "_ROWS", 7)
    monkeypatch.setattr(kvcompress.score, "_COLUMNS", 16)
    assert torch.allclose(score(layer), whole, rtol=1e-4, atol=1e-5 * whole[0].max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [{}, {"pool": "max"}, {"pool": "avg", "window": None, "recent": 8}, {"sink": 3}])
def test_padded_rows(parameters, dtype, device):
    layer = prompt(LENGTHS, dtype=dtype, device=device)
    for budget in (20, 0.3):
        method = create("obcache", budget=budget, **{"window": 8, **parameters})
        assert_padded_rows_equal_those_rows_alone(method, layer)


def test_forces_sinks_and_recent_entries(device):
    positions = kept(compress(create("obcache", budget=20, window=8, sink=3, recent=5), prompt([60], device=device)))
    assert positions[:, :3].tolist() == [[0, 1, 2]] * 2
    assert positions[:, -5:].tolist() == [[55, 56, 57, 58, 59]] * 2


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"kind": "both"}, "OutputPerturbation: kind must be one of .*, got 'both'"),
        ({"p": 3}, "OutputPerturbation: p must be one of .*, got 3"),
        ({"window": None}, "obcache: recent must be given where the whole prompt observes, got None"),
        ({"window": 0, "recent": 4}, "OutputPerturbation: queries must be at least 1, got 0"),
        ({"kernel_size": 4}, "OutputPerturbation: kernel_size must be odd and positive, got 4"),
        ({"budget": 32}, "obcache: budget must be more than the 32 forced entries, got 32"),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("obcache", **{"budget": 0.5, **parameters})
