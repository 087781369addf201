"""Any score with any budget: combinations drawn at random hold what the stages promise, or are refused when built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.attend import attend
from kvcompress.budget import PrefixMass, Pyramid, Squeeze, Uniform, ZigZag, entries
from kvcompress.heads import AdaptiveHeads
from kvcompress.methods import create
from kvcompress.methods.lava import EntropyShare
from kvcompress.pipeline import Pipeline, is_mass
from tests.pipeline.test_pipeline import DIM, METHODS, layer

Q_PER_KV, LAYERS = 2, 3
SCORES = {
    **METHODS,
    "streaming_llm": {"rolling": False},
    "lava": {"window": 8},
    "prefixkv": {},
}
del SCORES["sliding_window"]  # evicts at every step
MASSES = sorted(name for name in SCORES if is_mass(create(name, budget=0.5, **SCORES[name]).stages().score))
LAYER_BUDGETS = ["uniform", "pyramid", "lava", "squeeze", "zigzag", "prefix"]
HEADS = ["equal", "adakv", "adakv_safeguard", "adakv_normalised"]


def combined(name, budget, layers, heads):
    """Stages of the method's score and selection with other budgets."""
    stages = create(name, budget=0.5, **SCORES[name]).stages()
    forced = stages.select.forced
    made = {
        "uniform": lambda: Uniform(budget),
        "pyramid": lambda: Pyramid(budget, forced),
        "lava": lambda: EntropyShare(budget, stages.select),
        "squeeze": lambda: Squeeze(budget, p=0.5),
        "zigzag": lambda: ZigZag(budget, window=8),
        "prefix": lambda: PrefixMass(budget, forced),
    }[layers]()
    split = {
        "equal": None,
        "adakv": AdaptiveHeads(),
        "adakv_safeguard": AdaptiveHeads(rounding="safeguard"),
        "adakv_normalised": AdaptiveHeads(normalise=True),
    }[heads]
    return replace(stages, budget=made, heads=split)


def run(stages, states, cosines):
    pipeline = Pipeline(stages, LAYERS)
    stores = []
    for i, state in enumerate(states):
        stores.append(pipeline.compress(state))
        if pipeline.wants_residual:
            pipeline.observe_residual(i, cosines[i])
    assert not pipeline.is_waiting
    return stores


def positions_of(store):
    held = store.padded_positions()
    return [[line[line >= 0] for line in row] for row in held]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(SCORES)),
    budget=st.one_of(st.integers(16, 70), st.sampled_from([0.25, 0.4, 0.7])),
    layers=st.sampled_from(LAYER_BUDGETS),
    heads=st.sampled_from(HEADS),
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_combinations(name, budget, layers, heads, lengths, seed):
    if (layers in ("lava", "prefix") or heads == "adakv_normalised") and name not in MASSES:
        with pytest.raises(ValueError, match="score must be a mass, never negative"):
            combined(name, budget, layers, heads)
        return
    torch.manual_seed(seed)
    stages = combined(name, budget, layers, heads)
    states = [layer(i, LAYERS, lengths, "cpu") for i in range(LAYERS)]
    stores = run(stages, states, torch.rand(LAYERS, len(lengths)))
    num_heads, forced = stages.score(states[0]).shape[1], stages.select.forced
    for row, length in enumerate(lengths):
        counts = [store.head_lengths[row] for store in stores]
        # the total is met to the last entry, unless every layer must keep what is forced, or the prompt is shorter
        mean = max(entries(budget, length), forced) if layers == "uniform" else entries(budget, length)
        total = sum(map(sum, counts))
        if forced <= mean and length >= mean:
            loss = num_heads if heads == "adakv_normalised" and layers in ("lava", "squeeze", "zigzag", "prefix") else 0
            exact = LAYERS * num_heads * mean
            if loss:  # heads weigh otherwise at the bound, and keep to what they had then
                assert total <= exact
            else:
                assert total == exact, (counts, mean)
        for layer_index, store in enumerate(stores):
            sinks, window = getattr(stages.select, "sink", 0), getattr(stages.select, "window", 0)
            state = states[layer_index]
            for head, at in enumerate(positions_of(store)[row]):
                assert len(at) == counts[layer_index][head]
                assert (at.diff() > 0).all()  # ascending
                assert (at < length).all()  # and no padding, which has no position
                if len(at) >= sinks + window:
                    must = {*range(min(sinks, length)), *range(max(0, length - window), length)}
                    assert must <= set(at.tolist())
                column = (at + state.seq_len - length).long()
                source = state.keys[row, head * state.keys.shape[1] // num_heads, column]
                assert torch.equal(rows_of(store, row, head), source)
    for store in stores:
        tensors = [t for t in vars(store).values() if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert store.nbytes == sum(storages.values())


def rows_of(store, row, head):
    """Keys of a row and head."""
    n = store.head_lengths[row][head]
    if store.kind == "dense":
        return store.keys[row, head, :n]
    start = int(store.row_start[row * store.heads + head])
    return store.keys[start : start + n]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(MASSES),
    layers=st.sampled_from(LAYER_BUDGETS),
    heads=st.sampled_from(HEADS),
    lengths=st.lists(st.integers(9, 60), min_size=1, max_size=3),
)
def test_budget_of_the_whole_prompt_is_full_attention(name, layers, heads, lengths):
    stages = combined(name, 1.0 if layers != "pyramid" else 500, layers, heads)
    states = [layer(i, LAYERS, lengths, "cpu") for i in range(LAYERS)]
    stores = run(stages, states, torch.rand(LAYERS, len(lengths)))
    num_heads = stages.score(states[0]).shape[1]
    for state, store in zip(states, stores):
        assert store.is_complete
        keys, values = (torch.randn(len(lengths), 2, 1, DIM) for _ in range(2))
        query = torch.randn(len(lengths), 4, 1, DIM)
        store.append(keys, values)
        out = store.attend(query, softmax_scale=DIM**-0.5)
        k, v = torch.cat([state.keys, keys], 2), torch.cat([state.values, values], 2)
        k, v = (t.repeat_interleave(num_heads // 2, 1) for t in (k, v))
        starts = [state.seq_len - n for n in lengths]
        expected = attend(query.double(), k.double(), v.double(), softmax_scale=DIM**-0.5, starts=starts)
        assert torch.allclose(out.double(), expected, atol=2e-6)
