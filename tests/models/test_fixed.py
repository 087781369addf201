"""FixedCache: the tokens of CompressedCache, from buffers that stay, in steps that compile."""

from __future__ import annotations

import copy

import pytest
import torch

from kvcompress.methods import create
from kvcompress.models import FixedCache, attach
from tests.models.common import cache_of, generate, padded, prompt

BUDGET = 30
SNAPKV = create("snapkv", budget=BUDGET, window=8, kernel_size=3)
ADAKV = create("adakv", budget=BUDGET, inner=SNAPKV)
ADAKV_MORPHKV = create(
    "prefill_decode", budget=BUDGET, prefill=ADAKV, decode=create("morphkv", budget=BUDGET, window=8)
)
METHODS = {
    "full": None,
    "snapkv": SNAPKV,
    "h2o": create("h2o", budget=BUDGET, decode=True),
    "tova": create("tova", budget=BUDGET, decode=True),
    "morphkv": create("morphkv", budget=BUDGET, window=8),
    "streaming_llm": create("streaming_llm", budget=BUDGET),
    "sliding_window": create("sliding_window", budget=BUDGET),
    "squeeze": create("squeeze_attention", budget=BUDGET, inner=SNAPKV, p=0.5),
    "adakv": ADAKV,
    "lava": create("lava", budget=BUDGET, window=8, kernel_size=3),
    "snapkv_morphkv": create(
        "prefill_decode", budget=BUDGET, prefill=SNAPKV, decode=create("morphkv", budget=BUDGET, window=8)
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_tokens_as_the_growing_cache(llama, name):
    method = METHODS[name]
    rows = [prompt(llama, n, seed=n) for n in (90, 61, 40)]
    ids, mask = padded(rows)
    fixed = FixedCache(llama.config, method, room=64)
    tokens, logits = generate(llama, fixed, ids, 40, attention_mask=mask)
    expected, wanted = generate(llama, cache_of(llama, method), ids, 40, attention_mask=mask)
    assert torch.equal(tokens, expected)
    assert torch.allclose(logits, wanted, atol=2e-3)
    fixed.check_room()
    assert fixed.stats().logical_tokens == 90 + 39


@pytest.mark.parametrize("name", ["full", "snapkv", "h2o", "morphkv", "streaming_llm", "squeeze"])
def test_sliding_layers_are_rings(hybrid, name):
    """A hybrid model: the tokens of the growing cache, from prompts below, around and above the window of 24, past it by far."""
    method = METHODS[name]
    rows = [prompt(hybrid, n, seed=n) for n in (90, 31, 24, 9)]
    ids, mask = padded(rows)
    fixed = FixedCache(hybrid.config, method, room=64)
    tokens, logits = generate(hybrid, fixed, ids, 40, attention_mask=mask)
    expected, wanted = generate(hybrid, cache_of(hybrid, method), ids, 40, attention_mask=mask)
    assert torch.equal(tokens, expected)
    assert torch.allclose(logits, wanted, atol=2e-3)
    before = [t.data_ptr() for layer in fixed.layers for t in layer.store.tensors]
    rings = [layer.store for layer in fixed.layers if layer.is_sliding]
    assert [ring.keys.shape[2] for ring in rings] == [24, 24]
    assert all((ring.ordered_positions()[0, 0] == torch.arange(105, 129, device=ids.device)).all() for ring in rings)
    fixed.reset()
    again, _ = generate(hybrid, fixed, ids, 40, attention_mask=mask)
    assert torch.equal(tokens, again)
    assert before == [t.data_ptr() for layer in fixed.layers for t in layer.store.tensors]


@pytest.mark.parametrize("name", ["snapkv", "h2o", "morphkv"])
def test_a_second_prompt_uses_the_same_buffers(llama, name):
    cache = FixedCache(llama.config, METHODS[name], room=32)
    first, _ = generate(llama, cache, prompt(llama, 90))
    before = [t.data_ptr() for layer in cache.layers for t in layer.store.tensors]
    nbytes = cache.stats().nbytes
    cache.reset()
    generate(llama, cache, prompt(llama, 123, seed=4))
    assert before == [t.data_ptr() for layer in cache.layers for t in layer.store.tensors]
    assert nbytes == cache.stats().nbytes
    cache.reset()
    again, _ = generate(llama, cache, prompt(llama, 90))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "morphkv"])
def test_beams(llama, name):
    ids = prompt(llama)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    tokens, _ = generate(llama, FixedCache(llama.config, METHODS[name], room=32), ids, **beams)
    expected, _ = generate(llama, cache_of(llama, METHODS[name]), ids, **beams)
    assert torch.equal(tokens, expected)


def test_drafts(llama):
    """Prompt lookup gives the same tokens where a method can take drafts back, and is refused where it cannot."""
    ids = prompt(llama)
    drafted, _ = generate(llama, FixedCache(llama.config, SNAPKV, room=64), ids, 20, prompt_lookup_num_tokens=4)
    expected, _ = generate(llama, cache_of(llama, SNAPKV), ids, 20, prompt_lookup_num_tokens=4)
    assert torch.equal(drafted, expected)
    with attach(llama), pytest.raises(NotImplementedError, match="evicts entries while decoding"):
        llama.generate(
            ids, past_key_values=FixedCache(llama.config, METHODS["h2o"]), prompt_lookup_num_tokens=4, max_new_tokens=4
        )


@pytest.mark.parametrize("name", ["h2o", "tova", "morphkv", "streaming_llm", "sliding_window", "adakv_morphkv"])
def test_a_long_stream_stays_in_its_buffers(llama, name):
    """300 tokens, ten times the budget: the same buffers, the same bytes, finite answers, the newest token among the entries."""
    cache = FixedCache(llama.config, (METHODS | {"adakv_morphkv": ADAKV_MORPHKV})[name])
    with attach(llama), torch.no_grad():
        logits = llama(prompt(llama, 50), past_key_values=cache).logits[:, -1:]
        before = [t.data_ptr() for layer in cache.layers for t in layer.store.tensors]
        nbytes = cache.stats().nbytes
        for _ in range(300):
            logits = llama(logits.argmax(-1), past_key_values=cache).logits[:, -1:]
    assert torch.isfinite(logits).all()
    assert before == [t.data_ptr() for layer in cache.layers for t in layer.store.tensors]
    assert cache.stats().nbytes == nbytes
    assert cache.stats().logical_tokens == 350
    for layer in range(len(cache.layers)):
        assert (cache.positions(layer).amax(-1) == 349).all()
    if name == "adakv_morphkv":
        heads = [layer.head_entries[0] for layer in cache.stats().layers]
        assert all(sum(row) == 2 * (BUDGET + 1) for row in heads)
        assert any(len(set(row)) > 1 for row in heads)


@pytest.mark.parametrize("name", ["snapkv", "morphkv"])
def test_generate_compiles_by_itself(llama, name):
    """Where the cache says so, `generate()` compiles the decode steps on CUDA; the tokens stay."""
    if llama.device.type != "cuda":
        pytest.skip("generate() compiles on a GPU only")
    ids = prompt(llama)
    cache = FixedCache(llama.config, METHODS[name], room=64, compiles=True)
    tokens, _ = generate(llama, cache, ids, 24)
    expected, _ = generate(llama, cache_of(llama, METHODS[name]), ids, 24)
    assert torch.equal(tokens, expected)


def test_a_hybrid_step_compiles_once(hybrid):
    """One graph for prompts below and above the window."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(hybrid.forward, fullgraph=True, backend=backend)
    cache = FixedCache(hybrid.config, METHODS["h2o"])
    with attach(hybrid):
        for length in (90, 61, 40):
            ids = prompt(hybrid, length, seed=length)
            cache.reset()
            compiled = greedy(hybrid, cache, step, ids, 12)
            cache.reset()
            assert torch.equal(compiled, greedy(hybrid, cache, hybrid, ids, 12))
    assert len(graphs) <= 2


def greedy(model, cache, step, ids, new):
    """Prompt eagerly, then `new` tokens through `step`."""
    with torch.no_grad():
        logits = [model(ids, past_key_values=cache).logits[:, -1]]
        for i in range(new):
            token = logits[-1].argmax(-1, keepdim=True)
            position = torch.full_like(token, ids.shape[1] + i)
            logits.append(step(input_ids=token, position_ids=position, past_key_values=cache).logits[:, -1].clone())
    return torch.stack(logits, 1)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "morphkv", "streaming_llm"])
def test_a_step_compiles_once_for_all_prompts(llama, name):
    """``fullgraph=True``: one graph for prompts of four lengths; the answers are those of the eager step."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(llama.forward, fullgraph=True, backend=backend)
    cache = FixedCache(llama.config, METHODS[name], room=32)
    with attach(llama):
        for length in (90, 61, 123, 40):
            ids = prompt(llama, length, seed=length)
            cache.reset()
            compiled = greedy(llama, cache, step, ids, 12)
            cache.reset()
            assert torch.equal(compiled, greedy(llama, cache, llama, ids, 12))
    assert len(graphs) <= 2


def test_what_it_cannot_do_is_refused(llama, hybrid):
    with pytest.raises(ValueError, match="one entry a token"):
        FixedCache(llama.config, create("tova", budget=BUDGET, decode=True, every=2))
    with pytest.raises(ValueError, match="evict while decoding in a FixedCache only"):
        cache_of(llama, ADAKV_MORPHKV)
    with pytest.raises(NotImplementedError, match="drafts before it cuts"):
        FixedCache(llama.config, create("laq", budget=64))
    chunks = copy.deepcopy(hybrid.config)
    chunks.layer_types = ["chunked_attention", *chunks.layer_types[1:]]
    chunks.attention_chunk_size = 16
    with pytest.raises(NotImplementedError, match="or over a sliding window, got chunked_attention"):
        FixedCache(chunks, SNAPKV)
    cache = FixedCache(hybrid.config, SNAPKV)
    with attach(hybrid), pytest.raises(NotImplementedError, match="sliding-window layers overwrite"):
        hybrid.generate(prompt(hybrid), past_key_values=cache, prompt_lookup_num_tokens=4, max_new_tokens=4)


def test_tokens_without_room_are_refused(llama):
    """Before anything is written: what is held stays as it was."""
    cache = FixedCache(llama.config, SNAPKV, room=3)
    with pytest.raises(RuntimeError, match=r"room must be at least the tokens behind the prompt \(4\), got 3"):
        generate(llama, cache, prompt(llama), 8)
    assert all(entries == [BUDGET + 3] for entries in (layer.entries for layer in cache.stats().layers))
    cache.reset()
    assert generate(llama, cache, prompt(llama), 4)[0].shape[1] == 4  # three of them are read


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "morphkv", "streaming_llm"])
def test_a_captured_step_gives_the_same_to_the_bit(llama, name):
    check_captured(llama, METHODS[name])


@pytest.mark.parametrize("method", [ADAKV, ADAKV_MORPHKV], ids=["adakv", "adakv_morphkv"])
def test_a_captured_ragged_step_gives_the_same_to_the_bit(llama, method):
    check_captured(llama, method)


@pytest.mark.parametrize("name", ["snapkv", "morphkv"])
def test_a_captured_hybrid_step_gives_the_same_to_the_bit(hybrid, name):
    check_captured(hybrid, METHODS[name])


def check_captured(model, method):
    """One CUDA graph serves two prompts of different lengths, to the bit as launched one by one; two runs are equal as well."""
    if model.device.type != "cuda":
        pytest.skip("CUDA graphs are captured on a GPU")
    cache = FixedCache(model.config, method, room=32)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    position = torch.zeros_like(token)

    def launch():
        return model(input_ids=token, position_ids=position, past_key_values=cache).logits

    def run(ids, step):
        cache.reset()
        logits = [model(ids, past_key_values=cache).logits[:, -1]]
        for i in range(12):
            token.copy_(logits[-1].argmax(-1, keepdim=True))
            position.fill_(ids.shape[1] + i)
            logits.append(step()[:, -1].clone())
        return torch.stack(logits, 1)

    with attach(model), torch.no_grad():
        prompts = [prompt(model, 90), prompt(model, 123, seed=2)]
        eager_logits = [run(ids, launch) for ids in prompts]
        assert all(torch.equal(a, run(ids, launch)) for a, ids in zip(eager_logits, prompts))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launch()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = launch()

        def replay():
            graph.replay()
            return held

        for a, ids in zip(eager_logits, prompts):
            assert torch.equal(a, run(ids, replay))
