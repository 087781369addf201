"""Auto: its score against float64, the one list over layers and heads, and that it finds what a visible question asks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.scoring import DTYPES, LENGTHS, check, layer, widened
from tests.reference.rotary import rope


def reference_of(score):
    def reference(state: LayerState):
        length, heads = state.seq_len, state.keys.shape[1]
        keys = state.keys
        if score.before_rope:
            keys = rope(keys, -torch.arange(length, device=state.device), state.inv_freq)
        unit = keys / keys.norm(dim=-1, keepdim=True)
        anchor = unit.mean(2, keepdim=True)
        scores = -(unit * anchor / anchor.norm(dim=-1, keepdim=True)).sum(-1)
        if score.attention:
            queries = state.queries[:, :, -score.observers :]
            logits = queries @ state.keys.repeat_interleave(queries.shape[1] // heads, 1).mT * state.softmax_scale
            later = torch.ones(length, length, dtype=torch.bool, device=state.device).triu(1)[-queries.shape[2] :]
            seen = logits.masked_fill(later, -torch.inf).softmax(-1)
            scores = scores + score.attention * seen.unflatten(1, (heads, -1)).amax((2, 3))
        for age in range(min(score.recent, length)):
            scores[:, :, length - 1 - age] += score.recency * (1 - age / score.recent)
        return scores

    return reference


def products(state: LayerState, b: int) -> float:
    """The largest sum of |q_d k_d| behind a logit of row b: what a rounding of the logit is in proportion to."""
    row = widened(state, b, torch.float64)
    keys = row.keys.abs().repeat_interleave(row.queries.shape[1] // row.keys.shape[1], 1)
    return (row.queries.abs() @ keys.mT * row.softmax_scale).max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "parameters", [{}, {"attention": 0}, {"before_rope": False}, {"observers": 3, "recent": 5, "recency": 1.5}]
)
def test_scores(dtype, parameters, device):
    score = create("auto", budget=0.5, **parameters).stages().score
    for lengths in (LENGTHS, [1500, 1500]):  # the second: more than one chunk
        state = layer(lengths, dtype=dtype, device=device)
        # a rounding of a logit is a relative error of a probability
        largest = max(products(state, b) for b in range(len(lengths))) if score.attention else 0
        check(score, reference_of(score), state, roundings=4 + largest)


@pytest.mark.parametrize("budget", [20, 0.2, 1.0])
@pytest.mark.parametrize("lengths", [[120, 120], [120, 40, 5]])
def test_all_layers_and_heads_share_one_total(budget, lengths, device):
    layers, method = 4, create("auto", budget=budget)
    pipeline = Pipeline(method.stages(), layers)
    states = []
    for index in range(layers):
        state = layer(lengths, dtype=torch.float32, device=device, index=index)
        spread = torch.tensor([4.0, 0.2], device=device)[:, None, None] * (1 + index)
        offset = torch.ones(32, device=device) * 3
        states.append(replace(state, keys=state.keys * spread + offset, num_layers=layers))
    stores = [pipeline.compress(state) for state in states]
    assert not pipeline.is_waiting
    for row, length in enumerate(lengths):
        mean = budget if isinstance(budget, int) else int(budget * length)
        mean = min(length, max(mean, method.sink + method.window))
        counts = [store.head_lengths[row] for store in stores]
        assert sum(map(sum, counts)) == layers * 2 * mean
        forced = [*range(min(4, length)), *range(max(0, length - 8), length)]
        for store in stores:
            for line in store.padded_positions()[row].tolist():
                assert set(forced) <= set(line)
        if method.sink + method.window < mean < length:
            assert len({n for head in counts for n in head}) > 1
    alone = Pipeline(method.stages(), layers)
    single = [alone.compress(widened(state, 1, torch.float32)) for state in states]
    for one, batch in zip(single, stores):
        mine = [line[line >= 0].tolist() for line in one.padded_positions()[0]]
        assert mine == [line[line >= 0].tolist() for line in batch.padded_positions()[1]]


@pytest.mark.parametrize("drafted", [[5, 5, 5], [5, 3, 1]])
@pytest.mark.parametrize("lengths", [[70, 70, 70], [70, 33, 9]])
def test_the_queries_of_a_draft_pay_attention_too(lengths, drafted, device):
    """They see the whole prompt; what they pay counts where it is more than the prompt's own queries pay."""
    ahead = torch.randn(3, 4, 5, 32, device=device)
    state = replace(layer(lengths, dtype=torch.float32, device=device), lookahead=ahead, lookahead_lengths=drafted)
    whole, plain, keys = (
        create("auto", budget=0.5, **parameters).stages().score
        for parameters in ({"lookahead": 5}, {}, {"attention": 0})
    )
    scores = whole(state)
    for b, (length, count) in enumerate(zip(lengths, drafted)):
        row = state.row(b)
        logits = ahead[b, :, :count] @ row.keys[0].repeat_interleave(2, 0).mT * state.softmax_scale
        paid = logits.softmax(-1).unflatten(0, (2, 2)).amax((1, 2))
        prompt = (plain(row) - keys(row))[0] / 2
        expected = keys(row)[0] + 2 * torch.maximum(prompt, paid)
        assert torch.allclose(scores[b, :, -length:], expected, atol=1e-5)
        assert (paid > prompt).any()


def test_refused():
    with pytest.raises(ValueError, match="auto: lookahead must be at least 0, and 0 without attention"):
        create("auto", budget=0.5, lookahead=-1)
    with pytest.raises(ValueError, match="auto: lookahead must be at least 0, and 0 without attention"):
        create("auto", budget=0.5, lookahead=8, attention=0)
    with pytest.raises(RuntimeError, match="the model looks ahead when it decodes the first token"):
        Pipeline(create("auto", budget=0.5, lookahead=8).stages(), 1).compress(
            layer([40], dtype=torch.float32, device="cpu")
        )
    for name, value in (("attention", -1), ("observers", 0), ("recency", -0.1), ("recent", 0)):
        with pytest.raises(ValueError, match=f"auto: {name} must be at least"):
            create("auto", budget=0.5, **{name: value})
    state = replace(layer([40], dtype=torch.float32, device="cpu"), inv_freq=None)
    with pytest.raises(ValueError, match="inv_freq must be given"):
        Pipeline(create("auto", budget=0.5).stages(), 1).compress(state)
    assert Pipeline(create("auto", budget=0.5, before_rope=False).stages(), 1).compress(state).lengths == [20]
