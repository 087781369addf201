"""Every method of the registry in generate(): MHA, GQA and MQA, batches with left padding. A new method edits no list here."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompress.methods import available, create
from tests.models.common import PROMPT, cache_of, distinct, entries, generate, padded
from tests.models.conftest import SHAPE, _wild

NEW = 6


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def held(cache, row):
    """Layer, head and position of every entry that a row holds."""
    return {
        (layer.layer, head, position)
        for layer in cache.stats().layers
        for head, line in enumerate(cache.positions(layer.layer)[row].tolist())
        for position in line
        if position >= 0
    }


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", available())
def test_rows_of_a_padded_batch_are_those_rows_alone(name, kv_heads, device):
    """Kept positions, tokens and logits with the method's own defaults at half of the prompt.

    No token comes twice: in the first layer the norms of equal tokens' keys and values are equal but for the rounding of the
    rotation, and which of them a score of norms (CurDKV) keeps is for products of another shape to decide.
    """
    torch.manual_seed(3)
    shape = {**SHAPE, "num_key_value_heads": kv_heads}
    model = _wild(LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape))).to(device)
    method = create(name, budget=0.5)
    rows = [distinct(model, n, seed=n) for n in (PROMPT, 61, 12)]
    ids, mask = padded(rows)
    together = cache_of(model, method)
    tokens, logits = generate(model, together, ids, new=NEW, attention_mask=mask)
    for i, row in enumerate(rows):
        single = cache_of(model, method)
        wanted, expected = generate(model, single, row, new=NEW)
        assert held(together, i) == held(single, 0)
        assert torch.equal(tokens[i : i + 1], wanted)
        torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-3, atol=1e-3)
    full = cache_of(model, None)
    generate(model, full, ids, new=NEW, attention_mask=mask)
    assert sum(sum(layer) for layer in entries(together)) < sum(sum(layer) for layer in entries(full))
