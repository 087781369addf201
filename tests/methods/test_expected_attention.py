"""Expected Attention: scores against float64, short rows, and the expectation itself by sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from tests.methods.scoring import DTYPES, LENGTHS, check, layer, widened
from tests.reference.rotary import rope


def future(score, state: LayerState):
    """Rotated mean and covariance, every future rotation written out."""
    length = state.seq_len
    queries = rope(state.queries, -torch.arange(length, device=state.device), state.inv_freq)[:, :, score.sink :]
    mean = queries.mean(2, keepdim=True)
    covariance = (queries - mean).mT @ (queries - mean) / queries.shape[2]
    positions = torch.arange(length, length + score.n_future, device=state.device)
    eye = torch.eye(queries.shape[-1], device=state.device).to(queries.dtype)
    turns = rope(eye[:, None].expand(-1, score.n_future, -1), positions, state.inv_freq)  # [column, position, head_dim]
    turn = turns.mean(1).mT
    return mean @ turn.mT, turn @ covariance @ turn.mT


def exponents(score, state: LayerState):
    mean, covariance = future(score, state)
    keys = state.keys[:, :, score.sink :].repeat_interleave(mean.shape[1] // state.keys.shape[1], 1)
    z = state.softmax_scale * (keys * mean).sum(-1)
    if score.covariance:
        z = z + state.softmax_scale**2 / 2 * ((keys @ covariance) * keys).sum(-1)
    return z


def reference_of(score):
    def reference(state: LayerState):
        batch, heads, length, _ = state.keys.shape
        scores = torch.full((batch, heads, length), torch.inf, dtype=state.keys.dtype, device=state.device)
        if length <= score.sink:
            return scores
        attention = exponents(score, state).softmax(-1).unflatten(1, (heads, -1)).mean(2) + score.epsilon
        if score.value_norm:
            attention = attention * state.values[:, :, score.sink :].norm(dim=-1)
        scores[:, :, score.sink :] = attention
        return scores

    return reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"n_future": 1, "sink": 0},
        {"covariance": False, "epsilon": 0.02},
        {"value_norm": False, "sink": 33},
    ],
)
def test_scores(parameters, dtype, device):
    score = create("expected_attention", budget=0.5, **parameters).stages().score
    for lengths in (LENGTHS, [1100, 1100]):  # the second: more than one chunk
        state = layer(lengths, dtype=dtype, device=device)
        # a rounding of the exponent is a relative error of the score
        largest = max(exponents(score, widened(state, b, torch.float64)).abs().max().item() for b in range(2))
        check(score, reference_of(score), state, roundings=4 + largest)


def test_partial_rotation(device):
    """Dimensions beyond the rotated ones keep their statistics."""
    state = layer([50], dtype=torch.float32, device=device)
    state.inv_freq = state.inv_freq[:8]
    mean, covariance = create("expected_attention", budget=0.5).stages().score.future_queries(state)
    still = state.queries[:, :, 4:, 16:]
    assert torch.allclose(mean[..., 16:], still.mean(2), atol=1e-5)
    centred = still - still.mean(2, keepdim=True)
    expected = centred.mT @ centred / still.shape[2]
    assert torch.allclose(covariance[..., 16:, 16:], expected, atol=1e-4)


def test_is_the_expectation():
    """E exp(q.k / sqrt(d)) over Gaussian queries, by 200000 samples: what the closed form claims."""
    torch.manual_seed(1)
    root = torch.randn(8, 8, dtype=torch.float64) * 0.3
    mean, key = torch.randn(8, dtype=torch.float64) * 0.3, torch.randn(8, dtype=torch.float64)
    samples = ((mean + torch.randn(200_000, 8, dtype=torch.float64) @ root.mT) @ key / 8**0.5).exp()
    closed = (key @ mean / 8**0.5 + key @ root @ root.mT @ key / 16).exp()
    assert abs(samples.mean() - closed) < 5 * samples.std() / 200_000**0.5


def test_refused():
    with pytest.raises(ValueError, match="expected_attention: n_future must be at least 1, got 0"):
        create("expected_attention", budget=0.5, n_future=0)
    score = create("expected_attention", budget=0.5).stages().score
    state = layer([50], dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="frequencies: inv_freq must be given .* got None"):
        score(replace(state, inv_freq=None))
    with pytest.raises(ValueError, match=r"queries must be those of the whole prompt \(50\), got 32"):
        score(replace(state, queries=state.queries[:, :, -32:]))
    with pytest.raises(ValueError, match="queries must be given"):
        score(replace(state, queries=None))
