"""TOVA: the last query's attention, one set for the heads of a layer."""

from __future__ import annotations

import pytest
import torch

from kvcompress.methods import create
from tests.methods.states import (
    DTYPES,
    LENGTHS,
    assert_padded_rows_equal_those_rows_alone,
    assert_scores,
    attention,
    compress,
    kept,
    prompt,
)


def shared(layer):
    heads = layer.keys.shape[1]
    return attention(layer, 1)[:, :, 0].mean(1, keepdim=True).expand(-1, heads, -1)


def per_kv_head(layer):
    heads = layer.keys.shape[1]
    return attention(layer, 1)[:, :, 0].unflatten(1, (heads, -1)).mean(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference", [shared, per_kv_head])
def test_scores(reference, dtype, device):
    score = create("tova", budget=0.5, per_kv_head=reference is per_kv_head).stages().score
    assert score.queries == 1
    assert_scores(score, reference, prompt(LENGTHS, dtype=dtype, device=device))


def test_heads_share_one_set_and_nothing_is_protected(device):
    layer = prompt([60, 60], device=device)
    layer.keys[0, :, -1] = -50 * layer.queries[0, 0, -1]  # nobody looks at the last token itself
    layer.keys[0, :, 0] = 0
    store = compress(create("tova", budget=20), layer)
    assert torch.equal(store.positions[:, :1].expand_as(store.positions), store.positions)
    assert 59 not in kept(store, 0)
    assert kept(compress(create("tova", budget=20, window=1), layer), 0)[:, -1].tolist() == [59, 59]
    apart = compress(create("tova", budget=20, per_kv_head=True), layer)
    assert not torch.equal(kept(apart, 0)[0], kept(apart, 0)[1])


@pytest.mark.parametrize("budget", [17, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_rows(budget, dtype, device):
    layer = prompt(LENGTHS, dtype=dtype, device=device)
    assert_padded_rows_equal_those_rows_alone(create("tova", budget=budget), layer)


def test_refused():
    with pytest.raises(ValueError, match="TopK: window must be at least 0, got -1"):
        create("tova", budget=0.5, window=-1)
