"""ChunkKV: means over chunks, whole chunks kept, choices shared over layers."""

from __future__ import annotations

import pytest
import torch

from kvcompress.methods import create
from kvcompress.methods.chunkkv import Chunks
from kvcompress.pipeline import Pipeline
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


def reference(chunk, window, per_kv_head):
    def chunked(layer):
        votes = attention(layer, min(window, layer.seq_len)).sum(2).unflatten(1, (layer.keys.shape[1], -1)).mean(2)
        votes[:, :, max(layer.seq_len - window, 0) :] = torch.inf
        if layer.seq_len < chunk:
            return votes
        rows = votes if per_kv_head else votes.sum(1, keepdim=True).expand_as(votes)
        return torch.cat([part.mean(-1, keepdim=True).expand_as(part) for part in rows.split(chunk, -1)], -1)

    return chunked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 10, 64])
def test_scores(chunk, per_kv_head, dtype, device):
    score = create("chunkkv", budget=0.5, chunk=chunk, window=4, per_kv_head=per_kv_head).stages().score
    assert_scores(score, reference(chunk, 4, per_kv_head), prompt(LENGTHS, dtype=dtype, device=device))


@pytest.mark.parametrize("budget", [37, 40, 0.5])
def test_whole_chunks_for_all_heads(budget, device):
    layer = prompt([100], device=device)
    store = compress(create("chunkkv", budget=budget, window=10), layer)
    positions = kept(store)
    assert torch.equal(positions[:1].expand_as(positions), positions)
    chunks = {}
    for p in positions[0].tolist():
        chunks.setdefault(p // 10, []).append(p % 10)
    torn = [offsets for offsets in chunks.values() if offsets != list(range(10))]
    assert len(torn) <= 1  # the last one taken, kept from its front
    assert all(offsets == list(range(len(offsets))) for offsets in torn)
    votes = reference(10, 10, False)(layer)[0, 0, ::10]
    taken = votes.sort(descending=True, stable=True).indices[: len(chunks)].tolist()
    assert sorted(chunks) == sorted(taken)
    apart = kept(compress(create("chunkkv", budget=budget, window=10, per_kv_head=True), layer))
    assert not torch.equal(apart[0], apart[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [{}, {"per_kv_head": True}, {"inner": "h2o"}, {"inner": "tova", "chunk": 3}])
def test_padded_rows(parameters, dtype, device):
    for budget in (40, 0.4):
        method = create("chunkkv", budget=budget, window=8, **parameters)
        assert_padded_rows_equal_those_rows_alone(method, prompt(LENGTHS, dtype=dtype, device=device))


def test_reuse(device):
    """Six layers in pairs: the second of a pair keeps what the first keeps; with layer budgets, a subset or more."""
    method = create("chunkkv", budget=40, window=8, reuse=2)
    squeezed = create("squeeze_attention", inner=method, budget=40)
    states = [prompt([90, 41], index=i, num_layers=6, device=device) for i in range(6)]
    plain, nested = Pipeline(method.stages(), 6), Pipeline(squeezed.stages(), 6)
    alike, cut = [plain.compress(s) for s in states], [nested.compress(s) for s in states]
    for i, cosine in enumerate([0.5, 0.9, 0.5, 0.8, 0.55, 0.91]):
        nested.observe_residual(i, torch.tensor([cosine, cosine], device=device))
    for i in (0, 2, 4):
        for row in range(2):
            assert torch.equal(kept(alike[i], row), kept(alike[i + 1], row))
            few, many = kept(cut[i + 1], row)[0], kept(cut[i], row)[0]
            assert torch.isin(few, many).all()
    assert not torch.equal(kept(alike[0]), kept(alike[2]))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"chunk": 0}, "Chunks: chunk must be at least 1, got 0"),
        ({"reuse": 0}, "Stages: reuse must be at least 1 layer, got 0"),
        ({"inner": "zigzagkv"}, "chunkkv: inner must be a method with equal layer budgets, got zigzagkv"),
        ({"inner": "streaming_llm"}, "when must be Prefill for a score that cannot rank tokens appended later"),
    ],
)
def test_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        create("chunkkv", budget=0.5, **parameters)


def test_names_its_score():
    stage = create("chunkkv", budget=0.5, chunk=16).stages().score
    assert isinstance(stage, Chunks)
    assert str(stage) == "attention of the last 32 prompt tokens, mean over chunks of 16"
