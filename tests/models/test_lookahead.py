"""LAQ in generate(): the draft is what the model itself would decode, its queries choose, and nothing of it stays."""

from __future__ import annotations

import pytest
import torch

from kvcompress.methods import create
from kvcompress.models import CompressedCache, attach
from tests.models.common import cache_of, entries, generate, padded, prompt

BUDGET, STEPS = 30, 5
NAMES = {"laq": {}, "laqpp": {"window": 4}}


def laq(name, **options):
    draft = create("snapkv", budget=BUDGET, window=8, kernel_size=3)
    return create(name, budget=BUDGET, lookahead=STEPS, draft=draft, kernel_size=3, **NAMES[name], **options)


class Spy(CompressedCache):
    """Remembers the queries of every forward of one row, layer by layer."""

    queries: dict[int, list[torch.Tensor]]

    def attend(self, layer_idx, query, *args, **kwargs):
        self.queries.setdefault(layer_idx, []).append(query)
        return super().attend(layer_idx, query, *args, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_the_drafts_queries_are_those_of_decoding_over_the_drafts_cache(model, name):
    """Entries equal those chosen by the queries of an ordinary greedy run with the draft's own method."""
    ids, method = prompt(model), laq(name)
    spy = Spy(model.config, method.draft)
    spy.queries = {}
    cache = cache_of(model, method)
    taken = {}
    cache.take_lookahead = lambda queries, lengths: (
        taken.update(queries),
        CompressedCache.take_lookahead(cache, queries, lengths),
    )
    tokens, _ = generate(model, cache, ids, 12)
    generate(model, spy, ids, STEPS + 1)
    for layer_idx, queries in taken.items():
        expected = torch.cat(spy.queries[layer_idx][1 : STEPS + 1], 2)
        assert torch.allclose(queries, expected, atol=1e-5)
    assert entries(cache) == [[BUDGET + 11]] * len(entries(cache))
    first, _ = generate(model, cache_of(model, None), ids, 1)
    assert torch.equal(tokens[:, :1], first)  # the answer starts from the whole prompt


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_equals_its_rows_alone(llama, name):
    rows = [prompt(llama, n, seed=n) for n in (90, 61, 40)]
    ids, mask = padded(rows)
    cache = cache_of(llama, laq(name))
    together, _ = generate(llama, cache, ids, attention_mask=mask)
    for b, row in enumerate(rows):
        alone = cache_of(llama, laq(name))
        tokens, _ = generate(llama, alone, row)
        assert torch.equal(together[b], tokens[0])
        for layer in range(len(cache.layers)):
            assert torch.equal(cache.positions(layer)[b], alone.positions(layer)[0])


def test_auto_with_a_draft(llama):
    """Heads keep different numbers of entries, in the draft as in the cut; rows of a padded batch keep what they keep alone."""
    rows = [prompt(llama, n, seed=n) for n in (90, 61, 40)]
    ids, mask = padded(rows)
    method = create("auto", budget=BUDGET, lookahead=4)
    cache = cache_of(llama, method)
    together, _ = generate(llama, cache, ids, attention_mask=mask)
    for b, row in enumerate(rows):
        alone = cache_of(llama, method)
        tokens, _ = generate(llama, alone, row)
        assert torch.equal(together[b], tokens[0])
        for layer in range(len(cache.layers)):
            held = [
                [[p for p in head if p >= 0] for head in own.positions(layer)[i].tolist()]
                for own, i in ((cache, b), (alone, 0))
            ]
            assert held[0] == held[1]
    stores = [layer.store for layer in alone.layers]
    decoded = stores[0].seen[0] - rows[-1].shape[1]
    assert sum(sum(store.head_lengths[0]) for store in stores) == len(stores) * 2 * (BUDGET + decoded)


def test_a_draft_stops_at_the_end_of_the_answer(llama):
    ids = prompt(llama, batch=2)
    ids[1] = prompt(llama, seed=5)[0]
    drafted, _ = generate(llama, cache_of(llama, laq("laq").draft), ids, STEPS + 1)
    end = int(drafted[0, 2])  # row 0's draft ends with its third token
    counts = []
    cache = cache_of(llama, laq("laq"))
    cache.take_lookahead = lambda queries, lengths: (
        counts.append(lengths),
        CompressedCache.take_lookahead(cache, queries, lengths),
    )
    held = llama.generation_config.eos_token_id
    llama.generation_config.eos_token_id = end
    try:
        generate(llama, cache, ids, 3, eos_token_id=None)
    finally:
        llama.generation_config.eos_token_id = held
    first = (drafted[0, 1:] == end).nonzero()[0, 0] + 1
    other = (drafted[1, 1:] == end).nonzero()
    assert counts == [[int(first), int(other[0, 0]) + 1 if len(other) else STEPS]]


def test_sampling_beams_and_turns_go_on(llama):
    ids = prompt(llama)
    for options in ({"do_sample": True}, {"num_beams": 3}):
        torch.manual_seed(0)
        cache = cache_of(llama, laq("laqpp"))
        generate(llama, cache, ids, 6, **options)
        assert all(n == BUDGET + 5 for layer in entries(cache) for n in layer)


def test_it_is_refused_before_the_first_token(llama):
    cache = cache_of(llama, laq("laq"))
    with attach(llama), torch.no_grad():
        llama(prompt(llama), past_key_values=cache)
        with pytest.raises(RuntimeError, match="the model looks ahead when it decodes the first token"):
            cache.finish_prompt()
    with attach(llama), pytest.raises(NotImplementedError, match="generate without an assistant"):
        llama.generate(
            prompt(llama), past_key_values=cache_of(llama, laq("laq")), prompt_lookup_num_tokens=4, max_new_tokens=4
        )


def test_senseless_parameters_are_refused():
    with pytest.raises(ValueError, match='mask must be "exact" or "official"'):
        laq("laq", mask="causal")
    with pytest.raises(ValueError, match="budget must be more than the window"):
        create("laqpp", budget=8)
    with pytest.raises(ValueError, match="draft must be a method that does not look ahead"):
        create("laq", budget=64, draft="laqpp")
