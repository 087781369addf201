"""Left-padded batches: each row is that row alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache

from kvcompress.models import attach
from tests.models.common import NAMES, cache_of, generate, method, padded, prompt

LENGTHS = [90, 61, 40, 12]
BUDGETS = [30, 0.3]


def rows_of(model):
    return [prompt(model, length, seed=length) for length in LENGTHS]


def held(cache, layer, row):
    store = cache.layers[layer].store
    return cache.positions(layer)[row, :, : store.lengths[row]]


@pytest.mark.parametrize(("name", "budget"), [(None, None), *itertools.product(NAMES, BUDGETS)])
def test_each_row_equals_that_row_alone(model, name, budget):
    build = lambda: cache_of(model, method(name, budget) if name else None)  # noqa: E731
    rows = rows_of(model)
    ids, mask = padded(rows)
    together = build()
    tokens, logits = generate(model, together, ids, new=8, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = build()
        wanted, expected = generate(model, alone, row, new=8)
        assert torch.equal(tokens[i : i + 1], wanted)
        torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-3, atol=1e-3)
        for layer in (stats.layer for stats in alone.stats().layers):
            ours, theirs = held(together, layer, i), held(alone, layer, 0)
            # a prompt that fits is stored by kv heads even where the batch must store query heads
            assert torch.equal(ours, theirs.repeat_interleave(ours.shape[0] // theirs.shape[0], 0))


def test_padded_full_cache_is_the_dynamic_cache(model):
    ids, mask = padded(rows_of(model))
    wanted, logits = generate(model, DynamicCache(config=model.config), ids, new=8, attention_mask=mask, attached=False)
    tokens, ours = generate(model, cache_of(model, None), ids, new=8, attention_mask=mask)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(ours, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["snapkv", "squeeze_snapkv", "streaming_llm"])
def test_a_padded_second_turn(dense, name):
    """New tokens of unequal number: padding between the turns is never stored.

    Not for hybrid models: transformers' sliding layers count padding as tokens of the window.
    """
    model = dense
    rows, turns = rows_of(model), [prompt(model, n, seed=100 + n) for n in (9, 2, 6, 1)]
    ids, mask = padded(rows)
    more, more_mask = padded(turns)
    both, both_mask = torch.cat([ids, more], 1), torch.cat([mask, more_mask], 1)
    together = cache_of(model, method(name))
    with attach(model), torch.no_grad():
        first = (mask.cumsum(1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=first, past_key_values=together)
        second = (both_mask.cumsum(1) - 1).clamp(min=0)[:, ids.shape[1] :]
        logits = model(more, attention_mask=both_mask, position_ids=second, past_key_values=together).logits[:, -1]
        for i, (row, turn) in enumerate(zip(rows, turns)):
            alone = cache_of(model, method(name))
            model(row, past_key_values=alone)
            expected = model(turn, past_key_values=alone).logits[:, -1]
            torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-3, atol=1e-3)
            layer = alone.stats().layers[0].layer
            assert torch.equal(held(together, layer, i), held(alone, layer, 0))
    assert both.shape[1] == together.get_seq_length()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1, 1, 0, 0]], "attention_mask must pad on the left"),
        ([[0, 1, 0, 1, 1]], "attention_mask must pad on the left"),
    ],
)
def test_masks_that_are_not_left_padding_are_refused(llama, mask, words):
    with attach(llama), pytest.raises(ValueError, match=words):
        llama(prompt(llama, 5), attention_mask=torch.tensor(mask), past_key_values=cache_of(llama, None))


def test_masks_that_forget_the_past_are_refused(llama):
    with attach(llama), torch.no_grad():
        cache = cache_of(llama, None)
        llama(prompt(llama, 8), past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask must be .batch, 11., all tokens so far"):
            llama(prompt(llama, 3), attention_mask=torch.tensor([[0, 1, 1]]), past_key_values=cache)
        cache.reset()
        llama(prompt(llama, 8), past_key_values=cache)
        with pytest.raises(ValueError, match="must count the tokens that the cache has seen"):
            llama(prompt(llama, 3), attention_mask=torch.tensor([[0] * 4 + [1] * 7]), past_key_values=cache)


def test_other_caches_under_attach_are_left_alone(model):
    """Right padding, no cache, DynamicCache: what sdpa gives, attached or not."""
    ids, mask = padded(rows_of(model))
    for attention_mask in (None, mask, mask.flip(1)):
        with torch.no_grad():
            wanted = model(ids, attention_mask=attention_mask).logits
            with attach(model):
                assert torch.equal(model(ids, attention_mask=attention_mask).logits, wanted)
    row = prompt(model, 40)
    results = []
    for attached in (False, True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            if attached:
                with attach(model):
                    parts = [model(part, past_key_values=cache).logits for part in row.split(16, 1)]
            else:
                parts = [model(part, past_key_values=cache).logits for part in row.split(16, 1)]
        results.append(torch.cat(parts, 1))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
