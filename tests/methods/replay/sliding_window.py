"""Sliding window: kept positions and decode outputs.

Not compared: what the cache holds right after the prefill (official: all prompt rows until the first decode step; ours: cut at
once), and the prefill's own output where the official one is windowed (ours is causal over the whole prompt).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden, rows


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "D", "rope_base")
    length, steps, window = case.take("S"), case.take("T"), case.take("window_decode")
    queries, keys, values = case["q"], case["k"], case["v"]
    batch, _, _, dim = queries.shape
    layer = LayerState(0, 1, None, keys[:, :, :length], values[:, :, :length], [length] * batch, dim**-0.5)
    if case.take("window_prefill") + 1 >= length:
        out = F.scaled_dot_product_attention(
            queries[:, :, :length], layer.keys, layer.values, is_causal=True, enable_gqa=True
        )
        assert torch.allclose(out.transpose(1, 2), case["out_prefill"], atol=2e-5)
    pipeline = Pipeline(create("sliding_window", budget=window).stages(), 1)
    store = pipeline.compress(layer)
    assert store.positions[0, 0, : store.max_length].tolist() == rows(case["kept"])[0][-window:]
    for step in range(steps):
        new = slice(length + step, length + step + 1)
        pipeline.make_room(store, 1)
        store.append(keys[:, :, new], values[:, :, new])
        out = F.scaled_dot_product_attention(queries[:, :, new], *store.view(), enable_gqa=True)
        assert torch.allclose(out[:, :, 0], case["out"][step], atol=2e-5)
        pipeline.evict(store)
        assert store.positions[0, 0, : store.max_length].tolist() == rows(case["kept"])[step + 1]
