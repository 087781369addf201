"""Heads of different counts in generate(): MHA, GQA and MQA, padding, long turns, and what the heads hold."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompress.methods import create
from kvcompress.models import attach
from tests.models.common import BUDGET, PROMPT, cache_of, entries, generate, padded, prompt
from tests.models.conftest import SHAPE, _wild

METHODS = {
    "adakv": create("adakv", budget=BUDGET, inner=create("snapkv", budget=BUDGET, window=8, kernel_size=3)),
    "adakv_pyramid": create("adakv", budget=BUDGET, inner=create("pyramidkv", budget=BUDGET, window=8, kernel_size=3)),
    "lava": create("lava", budget=BUDGET, window=8, kernel_size=3),
    "adacurdkv": create("curdkv", budget=BUDGET, adaptive=0.2),
    "compactor": create(
        "compactor", budget=BUDGET, heads="layer", sink=2, window=6, chunk=16, leverage_block=32, sketch=8
    ),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def llama(kv_heads, device):
    torch.manual_seed(3)
    shape = {**SHAPE, "num_key_value_heads": kv_heads}
    return _wild(LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape))).to(device)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", METHODS)
def test_rows_of_a_padded_batch_are_those_rows_alone(name, kv_heads, device):
    """Tokens, logits, and every head's entries; the layer's total is met to the last one."""
    model = llama(kv_heads, device)
    rows = [prompt(model, n, seed=n) for n in (PROMPT, 61, 12)]
    ids, mask = padded(rows)
    together = cache_of(model, METHODS[name])
    tokens, logits = generate(model, together, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        single = cache_of(model, METHODS[name])
        wanted, expected = generate(model, single, row)
        assert torch.equal(tokens[i : i + 1], wanted)
        torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-3, atol=1e-3)
        for ours, theirs in zip(together.stats().layers, single.stats().layers):
            assert ours.head_entries[i] == theirs.head_entries[0]
            positions = together.positions(ours.layer)[i, :, : max(theirs.head_entries[0])]
            assert torch.equal(positions, single.positions(ours.layer)[0])
    layers, grown = together.stats().layers, tokens.shape[1] - 1
    for i, row in enumerate(rows):
        held = sum(sum(layer.head_entries[i]) for layer in layers)
        assert held == len(layers) * kv_heads * (min(BUDGET, row.shape[1]) + grown)
    if kv_heads > 1 and name != "compactor":
        assert any(len(set(layer.head_entries[0])) > 1 for layer in layers)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("new", [7, 20, 50])
def test_a_turn_is_its_tokens_one_by_one(kv_heads, new, device):
    """A few queries, several turns of the kernel, and head by head."""
    model = llama(kv_heads, device)
    turn = prompt(model, new, seed=5)
    whole, steps = cache_of(model, METHODS["adakv"]), cache_of(model, METHODS["adakv"])
    with attach(model):
        for cache in (whole, steps):
            model(prompt(model), past_key_values=cache)
            cache.finish_prompt()
        logits = model(turn, past_key_values=whole).logits
        expected = torch.cat([model(token, past_key_values=steps).logits for token in turn.split(1, 1)], 1)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert entries(whole) == entries(steps)


def test_a_second_prompt_part_behind_one_that_fits(device):
    """Nothing dropped ends no prompt: the cut is that of the whole, though the first part was stored already."""
    model, method = llama(2, device), create("lava", budget=BUDGET, window=8, kernel_size=3)
    ids = prompt(model)
    parts, whole = cache_of(model, method), cache_of(model, method)
    with attach(model):
        for part in (ids[:, :20], ids[:, 20:]):
            model(part, past_key_values=parts)
        model(ids, past_key_values=whole)
    for layer in range(3):
        assert torch.equal(parts.positions(layer), whole.positions(layer))


def test_moved_and_back(device):
    model = llama(2, device)
    cache = cache_of(model, METHODS["adakv"])
    token = prompt(model, 1, seed=2)
    with attach(model):
        model(prompt(model), past_key_values=cache)
        before = [cache.positions(i) for i in range(3)]
        for layer in cache.layers:
            layer.offload()
            assert layer.store.keys.device.type == "cpu"
            layer.prefetch()
        model(token, past_key_values=cache)
    for i, held in enumerate(before):
        now = cache.positions(i)
        for head, n in enumerate(cache.stats().layers[i].head_entries[0]):
            assert now[0, head, : n - 1].tolist() == held[0, head, : n - 1].tolist()
            assert now[0, head, n - 1] == PROMPT
