"""More than one forward of more than one token: chunks, turns, crops, copies, files."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from kvcompress.models import CompressedCache, attach
from tests.models.common import BUDGET, CUT_ONCE, NAMES, PROMPT, cache_of, entries, generate, method, prompt


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def forward(model, cache, *parts):
    with attach(model):
        return torch.cat([model(part, past_key_values=cache).logits[:, -1] for part in parts])


def same_entries(one, other, slots=None):
    for layer in (stats.layer for stats in one.stats().layers):
        ours, theirs = one.positions(layer)[..., :slots], other.positions(layer)[..., :slots]
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("chunk", [7, 32])
def test_chunked_prefill_is_the_one_shot_prefill(model, name, chunk):
    ids = prompt(model)
    build = lambda **options: cache_of(model, method(name) if name else None, **options)  # noqa: E731
    whole, parts = build(), build(chunked_prefill=True)
    wanted, expected = generate(model, whole, ids)
    tokens, logits = generate(model, parts, ids, prefill_chunk_size=chunk)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    same_entries(whole, parts)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_with_padding(llama, name):
    rows = [prompt(llama, n, seed=n) for n in (50, 31, 9)]
    ids = torch.cat([torch.nn.functional.pad(row, (50 - row.shape[1], 0)) for row in rows])
    mask = (ids != 0).long()
    whole, parts = cache_of(llama, method(name, 0.5)), cache_of(llama, method(name, 0.5), chunked_prefill=True)
    wanted, _ = generate(llama, whole, ids, attention_mask=mask)
    tokens, _ = generate(llama, parts, ids, attention_mask=mask, prefill_chunk_size=16)
    assert torch.equal(tokens, wanted)
    same_entries(whole, parts)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_prompt_behind_a_short_one_is_still_cut(model, name):
    """What fits into the budget does not end the prompt."""
    ids = prompt(model)
    whole, parts = cache_of(model, method(name)), cache_of(model, method(name))
    token = prompt(model, 1, seed=5)
    one = forward(model, whole, ids, token)
    two = forward(model, parts, ids[:, : BUDGET - 10], ids[:, BUDGET - 10 :], token)
    torch.testing.assert_close(two[1:], one, rtol=1e-3, atol=1e-3)
    same_entries(whole, parts)


@pytest.mark.parametrize("name", CUT_ONCE)
def test_later_turns_are_kept_whole(model, name):
    cache = cache_of(model, method(name))
    forward(model, cache, prompt(model))
    before = entries(cache)
    turn = prompt(model, 50, seed=7)
    whole = forward(model, cache, turn)
    assert entries(cache) == [[row[0] + 50] for row in before]
    again = cache_of(model, method(name))
    forward(model, again, prompt(model))
    single = forward(model, again, *turn.split(1, 1))[-1:]  # the same tokens one by one
    torch.testing.assert_close(whole, single, rtol=1e-3, atol=1e-3)
    same_entries(cache, again)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_generate_goes_on_with_the_same_cache(model, name):
    ids = prompt(model)
    cache = cache_of(model, method(name) if name else None)
    answer, _ = generate(model, cache, ids)
    turn = torch.cat([ids, answer, prompt(model, 10, seed=8)], 1)
    tokens, logits = generate(model, cache, turn)
    assert cache.get_seq_length() == turn.shape[1] + 11
    assert torch.isfinite(logits).all()
    if name is None:
        dynamic = DynamicCache(config=model.config)
        assert torch.equal(tokens, generate(model, dynamic, turn, attached=False)[0])


@pytest.mark.parametrize("name", CUT_ONCE)
def test_crop_takes_back_what_came_last(dense, name):
    model = dense
    cache = cache_of(model, method(name))
    turn, other = prompt(model, 6, seed=3), prompt(model, 4, seed=4)
    forward(model, cache, prompt(model), turn)
    cache.crop(-6)
    after = forward(model, cache, other)
    fresh = cache_of(model, method(name))
    assert torch.equal(after, forward(model, fresh, prompt(model), other)[1:])
    same_entries(cache, fresh)
    with pytest.raises(ValueError, match="must be at least -4, the tokens that came after the cut, got -5"):
        cache.crop(-5)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_saved_and_loaded_it_goes_on_identically(model, name, tmp_path):
    cache = cache_of(model, method(name) if name else None)
    token = prompt(model, 1, seed=5)
    forward(model, cache, prompt(model), token)
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedCache.load(
        tmp_path / "cache.safetensors", model.config, method(name) if name else None, device=model.device
    )
    same_entries(cache, loaded)
    assert loaded.get_seq_length() == cache.get_seq_length() == PROMPT + 1
    steps = prompt(model, 20, seed=6).split(1, 1)
    assert torch.equal(forward(model, cache, *steps), forward(model, loaded, *steps))


@pytest.mark.parametrize("name", ["snapkv", "squeeze_snapkv"])
def test_saved_in_the_middle_of_the_prompt(llama, name, tmp_path):
    ids, token = prompt(llama), prompt(llama, 1, seed=5)
    cache = cache_of(llama, method(name), chunked_prefill=True)
    forward(llama, cache, *ids[:, :60].split(20, 1))
    cache.save(tmp_path / "half.safetensors")
    loaded = CompressedCache.load(
        tmp_path / "half.safetensors", llama.config, method(name), device=llama.device, chunked_prefill=True
    )
    assert torch.equal(forward(llama, cache, ids[:, 60:], token), forward(llama, loaded, ids[:, 60:], token))
    same_entries(cache, loaded)
    with pytest.raises(ValueError, match="still at work, got None"):
        CompressedCache.load(tmp_path / "half.safetensors", llama.config)


def test_files_of_others_are_refused(llama, tmp_path):
    cache = cache_of(llama, method("streaming_llm"))
    forward(llama, cache, prompt(llama))
    cache.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="method must be streaming_llm"):
        CompressedCache.load(tmp_path / "a.safetensors", llama.config, method("snapkv"))
    with pytest.raises(ValueError, match="still at work, got None"):
        CompressedCache.load(tmp_path / "a.safetensors", llama.config)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "b.safetensors"))
    with pytest.raises(ValueError, match="must be a file of CompressedCache.save"):
        CompressedCache.load(tmp_path / "b.safetensors", llama.config)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_copy_is_another_cache(model, name):
    """One document, several questions: each on its own copy."""
    cache = cache_of(model, method(name) if name else None)
    forward(model, cache, prompt(model))
    question = prompt(model, 5, seed=2)
    other = copy.deepcopy(cache)
    first = forward(model, other, question)
    assert cache.get_seq_length() == PROMPT
    assert torch.equal(forward(model, cache, question), first)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_repeated_and_picked(llama, name):
    cache = cache_of(llama, method(name))
    forward(llama, cache, prompt(llama, batch=2))
    single = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    question = prompt(llama, 3, seed=2).expand(2, -1)
    torch.testing.assert_close(forward(llama, cache, question), forward(llama, single, question), rtol=1e-4, atol=1e-4)
    with attach(llama), pytest.raises(ValueError, match="batch must be 2, as the cache holds, got 3"):
        llama(question[:1].expand(3, -1), past_key_values=cache)


@pytest.mark.parametrize("name", NAMES)
def test_reset_starts_anew(model, name):
    cache, ids = cache_of(model, method(name)), prompt(model)
    first = generate(model, cache, ids)[1]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, cache, ids)[1], first)
