"""Every way to generate: greedy, sampling, beams, several sequences, prompt lookup, an assistant."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from kvcompress.models import attach
from tests.models.common import (
    BUDGET,
    CUT_ONCE,
    EVICTING,
    NAMES,
    PROMPT,
    cache_of,
    entries,
    generate,
    method,
    on_top,
    prompt,
)


def test_full_cache_is_the_dynamic_cache(model):
    ids = prompt(model)
    wanted, logits = generate(model, DynamicCache(config=model.config), ids, new=30, attached=False)
    tokens, ours = generate(model, cache_of(model, None), ids, new=30)
    assert torch.equal(tokens, wanted)
    assert len(set(wanted[0].tolist())) > 5  # the model does not just repeat itself
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [PROMPT + 40, 1.0])
def test_a_budget_of_the_whole_prompt_changes_nothing(model, name, budget):
    if budget == 1.0 and name in EVICTING:
        budget = 2 * PROMPT  # a share counts the prompt only, and these evict what comes later
    ids = prompt(model)
    full, wanted = generate(model, cache_of(model, None), ids)
    tokens, ours = generate(model, cache_of(model, method(name, budget)), ids)
    assert torch.equal(tokens, full)
    if name == "snapkv_q_heads":  # stored for each query head: the same numbers, summed in another order
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_dropped_and_everything_is_counted(model, name):
    ids, new = prompt(model), 12
    cache = cache_of(model, method(name))
    generate(model, cache, ids, new)
    stats = cache.stats()
    stored = [layer.entries[0] for layer in stats.layers]
    assert stats.logical_tokens == PROMPT + new - 1  # the last token is not fed back
    assert all(layer.logical == [PROMPT + new - 1] for layer in stats.layers)
    grown = new - 1 if name in CUT_ONCE else on_top(name, new - 1)
    if "squeeze" in name:
        assert len(set(stored)) > 1
        assert abs(sum(stored) - len(stored) * (BUDGET + grown)) <= 1
    else:
        assert stored == [BUDGET + grown] * len(stored)


@pytest.mark.parametrize("name", NAMES)
def test_sampling_is_reproducible_and_differs_from_greedy(llama, name):
    ids = prompt(llama)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(generate(llama, cache_of(llama, method(name)), ids, do_sample=True, temperature=2.0)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", NAMES)
def test_beams_equal_beams_without_reordering_the_cache(model, name):
    """Beams over the compressed cache end with the score that a fresh forward gives their best sequence."""
    ids = prompt(model)
    with attach(model):
        out = model.generate(
            ids,
            past_key_values=cache_of(model, method(name)),
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            max_new_tokens=8,
            min_new_tokens=8,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
        )
        for row in range(3):  # the same tokens again, one sequence, forced
            cache = cache_of(model, method(name))
            total, fed = 0.0, ids
            for token in out.sequences[row, PROMPT:]:
                logits = model(fed, past_key_values=cache).logits[0, -1]
                total += logits.log_softmax(-1)[token].item()
                fed = token.view(1, 1)
            assert out.sequences_scores[row].item() == pytest.approx(total, abs=1e-3)


def test_full_beams_are_those_of_the_dynamic_cache(model):
    ids = prompt(model)
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 8}
    wanted = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    with attach(model):
        assert torch.equal(model.generate(ids, past_key_values=cache_of(model, None), **options), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_several_sequences_of_one_prompt(llama, name):
    ids = prompt(llama)
    tokens, _ = generate(
        llama, cache_of(llama, method(name)), ids, do_sample=True, num_return_sequences=3, temperature=1.5
    )
    assert tokens.shape[0] == 3
    assert len({tuple(row.tolist()) for row in tokens}) == 3
    cache = cache_of(llama, method(name))
    with attach(llama):  # each one is what its own tokens give on a cache of its own
        logits = llama(ids, past_key_values=cache).logits[:, -1]
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", [None, *CUT_ONCE])
def test_prompt_lookup_is_greedy(model, name):
    ids = prompt(model)
    build = lambda: cache_of(model, method(name) if name else None)  # noqa: E731
    wanted, _ = generate(model, build(), ids, new=24)
    cache = build()
    with attach(model):
        tokens = model.generate(
            ids, past_key_values=cache, prompt_lookup_num_tokens=6, do_sample=False, max_new_tokens=24
        )
    assert torch.equal(tokens[:, PROMPT:], wanted)
    greedy = build()
    generate(model, greedy, ids, new=24)
    for layer in cache.stats().layers:  # what the prompt left is the same; the last drafts may be one token further
        ours, theirs = cache.positions(layer.layer), greedy.positions(layer.layer)
        shared = min(ours.shape[2], theirs.shape[2])
        assert torch.equal(ours[..., :shared], theirs[..., :shared])


def test_an_assistant_changes_nothing(model):
    """With itself as assistant all drafts are accepted."""
    ids = prompt(model)
    wanted, _ = generate(model, cache_of(model, None), ids, new=16)
    with attach(model):
        tokens = model.generate(
            ids, past_key_values=cache_of(model, None), assistant_model=model, do_sample=False, max_new_tokens=16
        )
    assert torch.equal(tokens[:, PROMPT:], wanted)


@pytest.mark.parametrize("name", CUT_ONCE)
def test_a_strange_assistant_changes_nothing(model, llama, name):
    """Hardly any draft is accepted, and what is taken back leaves no trace in a compressed cache."""
    ids, stranger = prompt(model), copy.deepcopy(llama)
    with torch.no_grad():
        stranger.lm_head.weight.normal_()
    wanted, _ = generate(model, cache_of(model, method(name)), ids, new=16)
    cache = cache_of(model, method(name))
    with attach(model):
        tokens = model.generate(
            ids, past_key_values=cache, assistant_model=stranger, do_sample=False, max_new_tokens=16
        )
    assert torch.equal(tokens[:, PROMPT:], wanted)
    assert cache.get_seq_length() == cache.stats().layers[0].logical[0] <= PROMPT + 16


@pytest.mark.parametrize("name", EVICTING)
def test_drafts_are_refused_where_entries_go_for_good(llama, name):
    with attach(llama), pytest.raises(NotImplementedError, match="rejected drafts cannot be taken back"):
        llama.generate(
            prompt(llama), past_key_values=cache_of(llama, method(name)), prompt_lookup_num_tokens=4, max_new_tokens=4
        )


@pytest.mark.parametrize("name", EVICTING)
def test_endless_generation_stays_at_its_budget(llama, name):
    cache = cache_of(llama, method(name), reserve=16)
    ids = prompt(llama, 50)
    with attach(llama), torch.no_grad():
        logits = llama(ids, past_key_values=cache).logits[:, -1:]
        start = entries(cache)
        sizes = set()
        for _ in range(200):
            logits = llama(logits.argmax(-1), past_key_values=cache).logits[:, -1:]
            assert torch.isfinite(logits).all()
            sizes.add(cache.stats().nbytes)
    assert entries(cache) == [[n + on_top(name, 200) for n in rows] for rows in start]
    assert len(sizes) <= 3
