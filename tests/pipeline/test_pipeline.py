"""The stages together: budgets met exactly, forced entries kept, padding never kept, nested second cuts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline

Q_HEADS, KV_HEADS, DIM = 4, 2, 16

METHODS = {
    "snapkv": {"window": 8},
    "streaming_llm": {},
    "sliding_window": {},
    "tova": {},
    "h2o": {},
    "chunkkv": {"window": 8},
    "obcache": {"window": 8},
    "knorm": {"skip_layers": ()},
    "keydiff": {},
    "curdkv": {},
    "random": {},
    "expected_attention": {},
    "compactor": {"sink": 2, "window": 6, "chunk": 16, "leverage_block": 32, "sketch": 8, "accounting": "inside"},
}

# with layer budgets of their own, which one layer alone gets whole
LAYERED = {
    "pyramidkv": {"window": 8},
    "zigzagkv": {"window": 8, "inner": create("snapkv", budget=0.5, window=8)},
    "prefixkv": {},
}
PARAMETERS = {**METHODS, **LAYERED}


def layer(index, layers, lengths, device, dtype=torch.float32):
    batch, seq_len = len(lengths), max(lengths)
    queries = torch.randn(batch, Q_HEADS, seq_len, DIM, device=device, dtype=dtype)
    keys, values = (torch.randn(batch, KV_HEADS, seq_len, DIM, device=device, dtype=dtype) for _ in range(2))
    starts = torch.tensor([seq_len - n for n in lengths], dtype=torch.int32, device=device)
    seq_start = starts if min(lengths) < seq_len else None
    inv_freq = 10000.0 ** (-torch.arange(0, DIM, 2, device=device) / DIM)
    return LayerState(index, layers, queries, keys, values, lengths, DIM**-0.5, seq_start, inv_freq=inv_freq)


def alone(state, row):
    """Row `row` of a padded batch as a batch of its own."""
    cut = state.seq_len - state.lengths[row]
    one = slice(row, row + 1)
    return LayerState(
        state.index,
        state.num_layers,
        state.queries[one, :, cut:],
        state.keys[one, :, cut:],
        state.values[one, :, cut:],
        [state.lengths[row]],
        state.softmax_scale,
        inv_freq=state.inv_freq,
    )


def kept(store, row):
    return store.positions[row, :, : store.lengths[row]]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("budget", [24, 0.25, 1.0, 500])
@pytest.mark.parametrize("lengths", [[100], [100, 61, 9, 30]])
def test_invariants(name, budget, lengths, device):
    method = create(name, budget=budget, **PARAMETERS[name])
    pipeline = Pipeline(method.stages(), 1)
    state = layer(0, 1, lengths, device)
    store = pipeline.compress(state)
    forced = method.stages().select.forced
    for row, length in enumerate(lengths):
        wanted = min(length, max(forced, budget if isinstance(budget, int) and budget > 1 else int(budget * length)))
        assert store.lengths[row] == wanted
        positions = kept(store, row)
        assert (positions >= 0).all()  # padding is never kept
        assert (positions < length).all()
        assert (positions.diff(dim=-1) > 0).all()
        where = (positions + state.seq_len - length).long()[..., None].expand(-1, -1, DIM)
        assert torch.equal(store.keys[row, :, :wanted], state.keys[row].gather(1, where))
        assert torch.equal(store.values[row, :, :wanted], state.values[row].gather(1, where))


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("budget", [24, 0.25])
def test_padded_row_equals_that_row_alone(name, budget, device):
    method = create(name, budget=budget, **PARAMETERS[name])
    state = layer(0, 1, [100, 61, 9, 30], device)
    together = Pipeline(method.stages(), 1).compress(state)
    for row in range(4):
        single = Pipeline(method.stages(), 1).compress(alone(state, row))
        assert torch.equal(kept(together, row), kept(single, 0))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("lengths", [[120, 120], [120, 77]])
def test_squeeze_two_cuts_equal_one(name, lengths, device):
    """The early cut to the upper bound and the second cut keep what one cut to the final budget would."""
    layers, inner = 6, create(name, budget=0.3, **METHODS[name])
    method = create("squeeze_attention", inner=inner, budget=0.3, p=0.4)
    pipeline = Pipeline(method.stages(), layers)
    states = [layer(i, layers, lengths, device) for i in range(layers)]
    stores = []
    for i, state in enumerate(states):
        stores.append(pipeline.compress(state))
        assert max(stores[-1].lengths) < max(lengths)  # the full cache is never held
        cosines = [[0.5, 0.55, 0.8, 0.97, 0.98, 0.99][i], [0.99, 0.98, 0.97, 0.8, 0.55, 0.5][i]]
        pipeline.observe_residual(i, torch.tensor(cosines, device=device))
    for row, length in enumerate(lengths):
        counts = [store.lengths[row] for store in stores]
        floor = method.stages().select.forced
        assert abs(sum(counts) - layers * int(0.3 * length)) <= 1
        important = counts if row == 0 else counts[::-1]
        assert min(important[:3]) > max(important[3:]) >= floor
    for i, (state, store) in enumerate(zip(states, stores)):
        for row in range(2):
            once = Pipeline(create(name, budget=store.lengths[row], **METHODS[name]).stages(), 1)
            assert torch.equal(kept(store, row), kept(once.compress(alone(state, row)), 0)), (i, row)
        assert store.scores is None


def test_streaming_stays_at_its_budget(device):
    pipeline = Pipeline(create("streaming_llm", budget=20).stages(), 1)
    store = pipeline.compress(layer(0, 1, [30, 7], device))
    inv_freq = 10000.0 ** (-torch.arange(0, DIM, 2, device=device) / DIM)
    for _ in range(50):
        pipeline.make_room(store, 1)
        store.append(*(torch.randn(2, KV_HEADS, 1, DIM, device=device) for _ in range(2)))
        pipeline.prepare(store, inv_freq)
        pipeline.evict(store)
    assert store.lengths == [20, 20]
    for row, seen in enumerate([80, 57]):
        assert kept(store, row)[0].tolist() == [0, 1, 2, 3, *range(seen - 16, seen)]


def test_sliding_window_sees_exactly_its_budget(device):
    pipeline = Pipeline(create("sliding_window", budget=20).stages(), 1)
    store = pipeline.compress(layer(0, 1, [30, 7], device))
    for step in range(30):
        pipeline.make_room(store, 1)
        store.append(*(torch.randn(2, KV_HEADS, 1, DIM, device=device) for _ in range(2)))
        assert store.lengths == [20, min(20, 8 + step)]
        pipeline.evict(store)


def test_layers_reuse_the_scores_of_the_first_of_their_group(device):
    stages = replace(create("snapkv", budget=30, window=8).stages(), reuse=2)
    pipeline = Pipeline(stages, 5)
    for _ in range(2):  # five layers leave a group open; the next prompt must not see it
        states = [layer(i, 5, [100, 61], device) for i in range(5)]
        stores = [pipeline.compress(state) for state in states]
        for i, store in enumerate(stores):
            own = Pipeline(replace(stages, reuse=1), 5).compress(states[i])
            first = Pipeline(replace(stages, reuse=1), 5).compress(states[i - i % 2])
            for row in range(2):
                assert torch.equal(kept(store, row), kept(first, row))
                assert i % 2 == 0 or not torch.equal(kept(store, row), kept(own, row))
        # a layer alone in its group, then a prompt whose first layer has nothing to drop and so no scores
        short, long = layer(0, 5, [30], device), layer(1, 5, [100], device)
        pipeline.compress(short)
        expected = Pipeline(replace(stages, reuse=1), 5).compress(long)
        assert torch.equal(kept(pipeline.compress(long), 0), kept(expected, 0))


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("snapkv", {"budget": 32}, "snapkv: budget must be more than the window of 32 entries, got 32"),
        ("snapkv", {"budget": 0.1, "kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ("snapkv", {"budget": 0.1, "window": 0}, "window must be at least 1, got 0"),
        ("snapkv", {"budget": 2.0}, "budget must be a share in"),
        ("snapkv", {"budget": 0.1, "windw": 3}, "parameters of snapkv must be among budget, window"),
        ("snapkv", {}, "budget of snapkv must be given, got nothing"),
        ("streaming_llm", {"budget": 4}, "budget must be more than the 4 sinks, got 4"),
        ("squeeze_attention", {"budget": 0.1, "p": 0.0}, "p must be in"),
        (
            "squeeze_attention",
            {"budget": 0.1, "inner": "squeeze_attention"},
            "inner must be a method with equal layer budgets",
        ),
        ("squeeze_attention", {"budget": 0.1, "inner": "snapkw"}, "name must be one of"),
    ],
)
def test_senseless_methods_are_refused(name, parameters, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        create(name, **parameters)


def test_every_step_needs_a_score_by_position():
    from kvcompress.pipeline import Stages
    from kvcompress.when import EveryStep

    stages = create("snapkv", budget=0.1).stages()
    with pytest.raises(ValueError, match="when must be Prefill for a score that cannot rank"):
        Stages(stages.score, stages.budget, stages.select, when=EveryStep())
