"""StreamingLLM: kept positions, key re-rotation, and the rolling attention loop with positions inside the cache.

`evict_range` is no part of the policy; its table rows go through the store that drops them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvcompress.cache import DenseStore
from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from kvcompress.rotary import rerotate
from tests.methods.golden import Golden, rows
from tests.reference.rotary import rope


def replay(case: Golden) -> None:
    if "k_rerot" in case.tensors:
        rerotation(case)
    elif "q_raw" in case.tensors:
        rolling(case)
    elif "kinds" in case:
        evictions(case)
    else:
        one_shot(case)


def prompt(length: int, batch: int = 1) -> LayerState:
    keys = torch.randn(batch, 1, length, 8)
    return LayerState(0, 1, None, keys, keys, [length] * batch, 1.0)


def kept(store: DenseStore) -> list[int]:
    return store.positions[0, 0, : store.max_length].tolist()


def evictions(case: Golden) -> None:
    kinds = case.take("kinds")
    assert kinds == {"0": "__call__", "1": "evict_for_space(num_coming=a)", "2": "evict_range(start=a,end=b)"}
    for config, expected in zip(case["config"].tolist(), rows(case["kept"])):
        kind, length, sink, recent, a, b = config
        layer = prompt(length)
        pipeline = Pipeline(create("streaming_llm", budget=sink + recent, n_sink=sink).stages(), 1)
        if kind == 0:
            assert kept(pipeline.compress(layer)) == expected, config
            continue
        store = DenseStore.from_prefill(layer.keys, layer.values, layer.lengths)
        if kind == 1:
            store.targets = [sink + recent]
            pipeline.fit(store, [max(sink + recent - a, min(sink, length))])
        else:
            index = torch.tensor([i for i in range(length) if not a <= i < b], dtype=torch.int32)
            store.keep(index.expand(1, 1, -1).contiguous(), [len(index)])
        assert kept(store) == expected, config


def one_shot(case: Golden) -> None:
    assert case.take("columns")[0] == "kind"
    for config, expected in zip(case["config"].tolist(), rows(case["kept"])):
        kind, length, capacity, window, ratio, sink = config
        if kind == 0:  # KVCache-Factory: capacity - window sinks
            sink = capacity - window
        elif kind == 1:  # AdaKV: 4 sinks
            sink = 4
        else:  # kvpress
            assert kind == 2, config
            capacity = max(1, int(length * (1 - ratio / 1000)))
        method = create("streaming_llm", budget=capacity, n_sink=sink, rolling=False)
        assert kept(Pipeline(method.stages(), 1).compress(prompt(length))) == expected, config


def rerotation(case: Golden) -> None:
    case.ignore("B", "H", "S", "D", "rope_base")
    index = case["indices"].long()
    keys = case["k_rot"].gather(2, index[..., None].expand(-1, -1, -1, case["k_rot"].shape[-1]))
    shift = torch.arange(case.take("n_kept")) - index
    moved = rerotate(keys, shift, case["inv_freq"])
    # the official code rotates in float32 from float32 angles of up to 120 radians: 120 * eps each
    assert torch.allclose(moved, case["k_rerot"], rtol=0, atol=2e-4)


def rolling(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "D")
    length, steps, base = case.take("S"), case.take("T"), case.take("rope_base")
    sink, recent = case.take("start_size"), case.take("recent_size")
    q_raw, k_raw, values = case["q_raw"], case["k_raw"], case["v"]
    batch, _, total, dim = q_raw.shape
    inv_freq = base ** (-torch.arange(0, dim, 2) / dim)
    positions = torch.arange(total)
    queries, keys = rope(q_raw, positions, inv_freq), rope(k_raw, positions, inv_freq)
    pipeline = Pipeline(create("streaming_llm", budget=sink + recent, n_sink=sink).stages(), 1)
    layer = LayerState(0, 1, None, keys[:, :, :length], values[:, :, :length], [length] * batch, dim**-0.5)
    out = F.scaled_dot_product_attention(
        queries[:, :, :length], layer.keys, layer.values, is_causal=True, enable_gqa=True
    )
    assert torch.allclose(out[:, :, -1], case["out_prefill_last"], atol=2e-5)
    store = pipeline.compress(layer)
    assert kept(store) == rows(case["kept"])[0]
    for step in range(steps):
        new = slice(length + step, length + step + 1)
        pipeline.make_room(store, 1)
        store.append(keys[:, :, new], values[:, :, new])
        pipeline.prepare(store, inv_freq)
        out = F.scaled_dot_product_attention(queries[:, :, new], *store.view(), enable_gqa=True)
        # logits of ~10 from float32 rotations at positions up to 50: the bound of the official rotation's own rounding
        assert torch.allclose(out[:, :, 0], case["out"][step], atol=1e-4)
        pipeline.evict(store)
        assert kept(store) == rows(case["kept"])[step + 1]
