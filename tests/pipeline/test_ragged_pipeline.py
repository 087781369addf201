"""Heads of different counts through the stages: sums, nested second cuts, and budgets that settle all layers and heads at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvcompress.budget import Uniform
from kvcompress.heads import AdaptiveHeads, OneList
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline, Stages
from kvcompress.ragged import RaggedStore
from kvcompress.select import TopK
from kvcompress.when import EveryStep
from tests.pipeline.test_pipeline import KV_HEADS, alone, layer

LAYERS = 5


def uneven(index, layers, lengths, device):
    """A layer whose heads attend differently: the first peaked, the last spread."""
    state = layer(index, layers, lengths, device)
    factor = torch.linspace(3, 0.3, KV_HEADS, device=device)[:, None, None] * (1 + index % 3)
    return replace(state, keys=state.keys * factor)


def assert_holds(store, state):
    """Every head holds the prompt's own K and V at ascending real positions, and the store's bytes are theirs."""
    positions = store.padded_positions()
    for row, counts in enumerate(store.head_lengths):
        for head, n in enumerate(counts):
            at = positions[row, head, :n]
            assert (at >= 0).all()
            assert (at < state.lengths[row]).all()
            assert (at.diff() > 0).all()
            column = (at + state.seq_len - state.lengths[row]).long()
            start = store.row_start[row * len(counts) + head]
            assert torch.equal(store.keys[start : start + n], state.keys[row, head, column])
            assert torch.equal(store.values[start : start + n], state.values[row, head, column])


def kept(store, row=0):
    positions = store.padded_positions()[row]
    return [line[line >= 0].tolist() for line in positions]


@pytest.mark.parametrize("inner", ["snapkv", "h2o", "keydiff", "streaming_llm_once", "pyramidkv"])
@pytest.mark.parametrize("rounding", ["exact", "safeguard"])
@pytest.mark.parametrize("lengths", [[100], [100, 61, 9, 40]])
def test_adaptive_heads(inner, rounding, lengths, device):
    made = {
        "snapkv": create("snapkv", budget=0.3, window=4),
        "streaming_llm_once": create("streaming_llm", budget=0.3, rolling=False),
        "pyramidkv": create("pyramidkv", budget=0.3, window=4),
    }
    method = create("adakv", budget=20, inner=made.get(inner, inner), rounding=rounding)
    state = uneven(1, 2, lengths, device)
    store = Pipeline(method.stages(), 2).compress(state)
    assert isinstance(store, RaggedStore)
    assert_holds(store, state)
    counts = method.stages().budget.first(state, None)
    for row, length in enumerate(lengths):
        assert sum(store.head_lengths[row]) == KV_HEADS * min(counts[row], length)
    single = Pipeline(method.stages(), 2).compress(alone(state, 0))
    assert kept(single) == kept(store)


def test_full_budget_stays_dense(device):
    store = Pipeline(create("adakv", budget=500, inner=create("snapkv", budget=50, window=4)).stages(), 1).compress(
        layer(0, 1, [100, 61], device)
    )
    assert store.kind == "dense"
    assert store.is_complete


@pytest.mark.parametrize("rounding", ["exact", "safeguard"])
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("lengths", [[120, 120], [120, 77]])
def test_two_cuts_equal_one(rounding, floor, lengths, device):
    inner = create("adakv", budget=0.3, inner=create("snapkv", budget=0.3, window=4), rounding=rounding, floor=floor)
    method = create("squeeze_attention", inner=inner, budget=0.3, p=0.4)
    pipeline = Pipeline(method.stages(), LAYERS)
    states = [uneven(i, LAYERS, lengths, device) for i in range(LAYERS)]
    stores = [pipeline.compress(state) for state in states]
    early = [store.head_lengths for store in stores]
    for i in range(LAYERS):
        pipeline.observe_residual(i, torch.tensor([0.5 + 0.1 * i, 0.9 - 0.1 * i], device=device))
    assert not pipeline.is_waiting
    for row, length in enumerate(lengths):
        total = sum(sum(store.head_lengths[row]) for store in stores)
        assert abs(total - LAYERS * KV_HEADS * int(0.3 * length)) <= KV_HEADS
    for i, (state, store) in enumerate(zip(states, stores)):
        assert_holds(store, state)
        for row in range(2):
            mean = sum(store.head_lengths[row]) // KV_HEADS
            once = Pipeline(replace(inner, budget=mean).stages(), 1).compress(alone(state, row))
            assert kept(store, row) == kept(once), (i, row)
            assert all(now <= then for now, then in zip(store.head_lengths[row], early[i][row]))


@pytest.mark.parametrize("lengths", [[80], [80, 53]])
def test_one_list_over_layers_and_heads(lengths, device):
    score = create("keydiff", budget=0.3).stages().score
    pipeline = Pipeline(Stages(score, OneList(20), TopK(sink=2, window=3)), LAYERS)
    states = [uneven(i, LAYERS, lengths, device) for i in range(LAYERS)]
    stores, most = [], 0
    for state in states:
        stores.append(pipeline.compress(state))
        most = max(most, sum(sum(store.head_lengths[0]) for store in stores))
    assert not pipeline.is_waiting
    assert (
        most <= (LAYERS * 20 + 80) * KV_HEADS * 9 / 8
    )  # the total, the current layer, and the bounds not yet worth a copy
    for row, length in enumerate(lengths):
        joint = torch.stack([score(alone(state, row))[0] for state in states])
        joint[:, :, :2] = joint[:, :, length - 3 :] = torch.inf
        chosen = joint.flatten().argsort(descending=True, stable=True)[: LAYERS * KV_HEADS * 20]
        mask = torch.zeros(joint.numel(), dtype=torch.bool, device=device)
        mask[chosen] = True
        mask = mask.view(joint.shape)
        for i, store in enumerate(stores):
            assert kept(store, row) == [line.nonzero().flatten().tolist() for line in mask[i]]
    for state, store in zip(states, stores):
        assert_holds(store, state)


def test_skipped_layers_are_equal(device):
    method = create("adakv", budget=20, inner=create("snapkv", budget=20, window=4), skip=2)
    pipeline = Pipeline(method.stages(), 3)
    counts = [pipeline.compress(uneven(i, 3, [90], device)).head_lengths[0] for i in range(3)]
    assert counts[:2] == [[20, 20], [20, 20]]
    assert counts[2][0] != counts[2][1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"when": EveryStep()}, "when must be Prefill for heads of different counts"),
        ({"budget": OneList(5)}, "heads must be None for a budget that counts for each head itself"),
        (
            {"attend": create("streaming_llm", budget=9).stages().attend},
            "attend must be None for heads of different counts",
        ),
    ],
)
def test_senseless_stages_are_refused(change, words):
    score = create("streaming_llm", budget=9).stages().score
    with pytest.raises(ValueError, match=words):
        replace(Stages(score, Uniform(9), TopK(), heads=AdaptiveHeads()), **change)


def test_adakv_over_heads_that_differ_is_refused():
    with pytest.raises(ValueError, match="inner must be a method that gives all heads the same, got adakv"):
        create("adakv", budget=0.1, inner="adakv")
