"""What the cache promises: memory, buffers, statistics, and errors instead of silence."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from kvcompress import budget, score, select
from kvcompress.methods import Method, create
from kvcompress.models import CompressedCache, attach
from kvcompress.models.attention import attention
from kvcompress.pipeline import Pipeline, Stages
from tests.models.common import BUDGET, CUT_ONCE, NAMES, PROMPT, cache_of, entries, generate, method, padded, prompt
from tests.models.conftest import SHAPE


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# --- memory


class Spy(CompressedCache):
    """Remembers all K and V that the model handed over, weakly."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.alive.append(sum(ref() is not None for ref in self.seen))
        self.seen += [weakref.ref(key_states.untyped_storage()), weakref.ref(value_states.untyped_storage())]
        self.seen += [weakref.ref(key_states), weakref.ref(value_states)]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_one_layers_keys_and_values(model, name):
    """When a layer hands over its K and V, no earlier layer's full tensors are alive."""
    cache = Spy(model.config, method(name))
    cache.alive, cache.seen = [], []
    with attach(model):
        model(prompt(model), past_key_values=cache)
    if model.config.model_type.startswith("gemma"):
        return  # transformers' sliding layers hold theirs
    assert cache.alive == [0] * len(cache.layers)


@pytest.mark.parametrize("name", CUT_ONCE)
def test_bytes_fall_with_the_budget(llama, name):
    full = cache_of(llama, None, reserve=8)
    cut = cache_of(llama, method(name), reserve=8)
    with attach(llama):
        for cache in (full, cut):
            llama(prompt(llama, 300), past_key_values=cache)
    heads = 2 if name.endswith("q_heads") else 1  # stored for each of two query heads
    assert cut.stats().nbytes < 0.25 * heads * full.stats().nbytes
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in cut.layers
        for t in vars(layer.store).values()
        if isinstance(t, torch.Tensor)
    }
    assert cut.stats().nbytes == sum(held.values())


@pytest.mark.parametrize("name", [None, *NAMES])
def test_decoding_appends_in_place(llama, name):
    """Buffers move only when they grow, and they grow by blocks."""
    cache = cache_of(llama, method(name) if name else None, reserve=32)
    token = prompt(llama, 1, seed=3)
    moves = [0] * len(cache.layers)
    with attach(llama):
        llama(prompt(llama), past_key_values=cache)
        llama(token, past_key_values=cache)
        pointers = [layer.store.keys.data_ptr() for layer in cache.layers]
        for _ in range(64):
            llama(token, past_key_values=cache)
            now = [layer.store.keys.data_ptr() for layer in cache.layers]
            moves = [n + (new != old) for n, new, old in zip(moves, now, pointers)]
            pointers = now
    assert max(moves) <= 2


# --- layers with budgets of their own


@dataclass(frozen=True)
class Rising(budget.Budget):
    """More for later layers: 10, 20, 30 ... entries."""

    def first(self, layer, scores):
        return [10 * (layer.index + 1) for _ in layer.lengths]


@dataclass(frozen=True)
class RisingSnap(Method):
    name = "rising"

    def stages(self):
        return Stages(score=score.WindowAttention(8), budget=Rising(), select=select.TopK(window=8))


def test_layers_of_unequal_length_and_padding(model):
    """One mask cannot fit these layers: decode, a turn of several tokens, and padding at once."""
    rows = [prompt(model, n, seed=n) for n in (90, 25)]
    ids, mask = padded(rows)
    chosen = RisingSnap(budget=1)
    together = cache_of(model, chosen)
    tokens, logits = generate(model, together, ids, attention_mask=mask)
    grown = tokens.shape[1] - 1
    layers = len(together.stats().layers)
    assert entries(together) == [[min(10 * (i + 1), n) + grown for n in (90, 25)] for i in range(layers)]
    for i, row in enumerate(rows):
        wanted, expected = generate(model, cache_of(model, chosen), row)
        assert torch.equal(tokens[i : i + 1], wanted)
        torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-3, atol=1e-3)


# --- statistics and positions


def test_stats_say_what_happened(llama):
    cache = cache_of(llama, method("snapkv"))
    assert cache.stats().layers[0].scorer == "nothing yet: the prompt is not over"
    generate(llama, cache, prompt(llama))
    stats = cache.stats()
    assert stats.layers[2].scorer == f"last 8 of {PROMPT} prompt tokens"
    assert stats.to_dict()["layers"][2]["entries"] == [BUDGET + 11]
    assert stats.method.startswith("snapkv(budget=30, window=8")
    text = str(stats)
    assert f"{PROMPT + 11} tokens" in text
    assert f"{BUDGET + 11}/{PROMPT + 11} entries" in text
    assert stats.layers[2].head_entries == [[BUDGET + 11] * SHAPE["num_key_value_heads"]]


def test_stats_of_heads_that_differ(llama):
    cache = cache_of(llama, method("snapkv_adakv"))
    generate(llama, cache, prompt(llama))
    for layer in cache.stats().layers:
        (heads,) = layer.head_entries
        assert sum(heads) == len(heads) * (BUDGET + 11)
    assert any(len(set(layer.head_entries[0])) > 1 for layer in cache.stats().layers)
    assert " a head) entries" in str(cache.stats())


@pytest.mark.parametrize("name", NAMES)
def test_positions_ascend_and_end_at_the_last_token(model, name):
    ids, mask = padded([prompt(model, n, seed=n) for n in (90, 61)])
    cache = cache_of(model, method(name, 0.3))
    generate(model, cache, ids, attention_mask=mask)
    for stats in cache.stats().layers:
        positions = cache.positions(stats.layer)
        assert positions.dtype == torch.int32
        for row, (heads, seen) in enumerate(zip(stats.head_entries, stats.logical)):
            for held, count in zip(positions[row], heads):
                assert (held[:count].diff() > 0).all()
                assert held[count - 1] == seen - 1
                assert (held[count:] == -1).all()


# --- errors


def test_without_attach_nothing_is_silent(model):
    for chosen in (None, method("snapkv")):
        cache = cache_of(model, chosen)
        with pytest.raises(RuntimeError, match=r"did not run through kvcompress.*attach\(model\)"):
            generate(model, cache, prompt(model), attached=False)


def test_one_layer_without_attach():
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SHAPE)).eval()
    cache = cache_of(model, method("snapkv"))
    model(prompt(model), past_key_values=cache)
    with pytest.raises(RuntimeError, match="did not run through kvcompress"):
        model(prompt(model, 1), past_key_values=cache)


def test_a_method_that_looks_into_the_model_needs_attach(llama):
    """The attention name alone is enough for some methods, never silently too little for others."""
    llama.set_attn_implementation("kvcompress")
    try:
        llama(prompt(llama), past_key_values=cache_of(llama, method("snapkv")))
        for name in ("squeeze_snapkv", "streaming_llm"):
            with pytest.raises(RuntimeError, match="looks into the model"):
                llama(prompt(llama), past_key_values=cache_of(llama, method(name)))
    finally:
        llama.set_attn_implementation("sdpa")


def test_attach_restores_everything(model):
    before = (model.config._attn_implementation, torch.backends.cuda.cudnn_sdp_enabled())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    handle = attach(model)
    with attach(model):
        assert model.config._attn_implementation == "kvcompress"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert model.config._attn_implementation == "kvcompress"
    handle.detach()
    assert (model.config._attn_implementation, torch.backends.cuda.cudnn_sdp_enabled()) == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    with pytest.raises(ZeroDivisionError), attach(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before[0]


def test_models_without_full_attention_are_refused():
    model = MistralForCausalLM(MistralConfig(num_hidden_layers=2, sliding_window=16, **SHAPE))
    with pytest.raises(ValueError, match="must have a full_attention layer to compress, got sliding_attention"):
        CompressedCache(model.config, method("snapkv"))


def test_rotations_that_change_with_the_length_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, rope_parameters=rope, **SHAPE)).eval()
    with attach(model):
        generate(model, cache_of(model, method("snapkv")), prompt(model))
        with pytest.raises(NotImplementedError, match="frequencies .dynamic. change with the length"):
            model(prompt(model), past_key_values=cache_of(model, method("streaming_llm")))
    with attach(model) as attachment:  # and before anything runs
        cache_of(model, method("snapkv")).check(attachment)
        with pytest.raises(NotImplementedError, match="frequencies .dynamic. change with the length"):
            cache_of(model, method("streaming_llm")).check(attachment)


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias", "sliding_window"])
def test_attention_that_would_be_ignored_is_refused(llama, option):
    with attach(llama), pytest.raises(NotImplementedError, match="which is not supported"):
        llama(prompt(llama), past_key_values=cache_of(llama, None), **{option: 3.0})


def test_a_softcap_is_refused_with_other_caches_too(llama):
    """What stands in for them, "sdpa", cannot do it."""
    with attach(llama), pytest.raises(NotImplementedError, match="soft-capped logits, which is not supported"):
        llama(prompt(llama), softcap=3.0)


def test_latent_attention_is_refused(llama):
    """A layer that caches something else than the keys that it attends over."""
    module, cache = llama.model.layers[0].self_attn, cache_of(llama, None)
    key, query = (torch.randn(1, heads, 20, 16, device=llama.device) for heads in (2, 4))
    with attach(llama):
        cache.update(key, key, 0)
        with pytest.raises(NotImplementedError, match="other keys than it gives the cache .latent attention."):
            attention(module, query, key.clone(), key, None)
        attention(module, query, key, key, None)  # its own are still taken


def test_custom_masks_are_refused(llama):
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with attach(llama), pytest.raises(NotImplementedError, match="must be a 2-D padding mask .* got a custom 4-D mask"):
        llama(prompt(llama, 20), attention_mask=mask, past_key_values=cache_of(llama, None))


def test_gradients_flow_but_nothing_stored_holds_them(llama):
    with torch.enable_grad(), attach(llama):
        cache = cache_of(llama, method("snapkv"))
        llama(prompt(llama), past_key_values=cache)
        llama(prompt(llama, 1), past_key_values=cache)
    assert not any(t.requires_grad for layer in cache.layers for t in layer.store.tensors.values())


@pytest.mark.parametrize("name", ["prefixkv", "zigzagkv", "squeeze_attention", "lava", "h2o"])
def test_no_queries_wait_behind_a_cut(llama, name):
    """A first bound may keep all entries of a layer, but the prompt cannot go on: no query of it is needed again."""
    keeps = {}
    for share, fits in ((0.5, False), (PROMPT, True)):
        cache = cache_of(llama, create(name, budget=share))
        with attach(llama):
            llama(prompt(llama), past_key_values=cache)
        assert all(layer.store.is_complete for layer in cache.layers) == fits
        keeps[fits] = [layer._queries is not None for layer in cache.layers]
    assert not any(keeps[False])
    assert all(keeps[True]) == (cache._pipeline.queries > 0)


class Watched(Pipeline):
    """Remembers what it is given."""

    def compress(self, layer, store=None):
        self.given = [*getattr(self, "given", []), layer]
        return super().compress(layer, store)


@pytest.mark.parametrize("chunk", [None, 30])
@pytest.mark.parametrize(
    ("name", "parameters", "wants_lse", "wants_output"),
    [
        ("h2o", {}, True, False),
        ("snapkv", {"window": 8}, True, False),
        ("obcache", {"window": 8}, True, True),
        ("obcache", {"window": None, "recent": 8}, True, True),
        ("streaming_llm", {}, False, False),
    ],
)
def test_the_prompts_own_attention_is_handed_over(llama, name, parameters, wants_lse, wants_output, chunk):
    """Its log-sum-exp where a stage asks for it and the whole prompt attends at once; its output, also chunk by chunk."""
    if llama.device.type == "cuda":  # whose kernels give none for float32
        llama = copy.deepcopy(llama).half()
    cache = cache_of(llama, create(name, budget=BUDGET, **parameters), chunked_prefill=chunk is not None)
    cache._pipeline = Watched(cache._pipeline.stages, cache._pipeline.num_layers)
    for layer in cache.layers:
        layer.pipeline = cache._pipeline
    outputs = {}
    hooks = [
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, i=i: outputs.setdefault(i, []).append(args[0].detach())
        )
        for i, block in enumerate(llama.model.layers)
    ]
    ids = prompt(llama)
    with attach(llama):
        for part in ids.split(chunk or PROMPT, 1):
            llama(part, past_key_values=cache)
        cache.finish_prompt()
    for hook in hooks:
        hook.remove()
    assert len(cache._pipeline.given) == len(cache.layers)
    for layer in cache._pipeline.given:
        assert (layer.lse is not None) == (wants_lse and chunk is None)
        assert (layer.output is not None) == (layer.queries is not None and (wants_output or chunk is None))
        if layer.lse is not None:
            assert layer.lse.shape == layer.queries.shape[:3]
            keys = layer.keys.repeat_interleave(layer.queries.shape[1] // layer.keys.shape[1], 1)
            logits = layer.queries.double() @ keys.double().mT * layer.softmax_scale
            column = torch.arange(PROMPT, device=layer.keys.device)
            logits = logits.masked_fill(column > column[-layer.queries.shape[2] :, None], -torch.inf)
            torch.testing.assert_close(layer.lse, logits.logsumexp(-1).float())
        if layer.output is not None:
            whole = torch.cat(outputs[layer.index], 1).unflatten(2, (layer.queries.shape[1], -1)).transpose(1, 2)
            assert torch.equal(layer.output, whole[:, :, -layer.queries.shape[2] :])


def test_bfloat16(llama):
    model = LlamaForCausalLM(llama.config).to(torch.bfloat16).eval()
    for name in NAMES:
        cache = cache_of(model, create("snapkv", budget=0.3, window=8) if name == "snapkv" else method(name))
        _, logits = generate(model, cache, prompt(model))
        assert torch.isfinite(logits).all()
        assert cache.layers[0].store.keys.dtype == torch.bfloat16
