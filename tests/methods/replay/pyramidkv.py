"""PyramidKV: the budget tables of the official code and of kvpress, and scores and kept sets of every layer.

Sets are compared; the official order is that of the scores. The exact line, which is our default, has no official counterpart.
"""

from __future__ import annotations

import torch

from kvcompress.budget import Pyramid
from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden


def layer_counts(stage: Pyramid, layers: int, length: int) -> list[int]:
    empty = torch.empty(1, 1, length, 0)
    states = [LayerState(i, layers, None, empty, empty, [length], 1.0) for i in range(layers)]
    return [min(stage.first(state, None)[0], length) for state in states]


def replay(case: Golden) -> None:
    if "config" in case.tensors:
        budget_table(case)
    else:
        all_layers(case)


def budget_table(case: Golden) -> None:
    columns = [case[name].tolist() for name in ("config", "kept_total", "kvpress_budget", "kvpress_ratio")]
    for (layers, length, capacity, window, beta), kept, kvpress, ratio in zip(*columns):
        official = Pyramid(capacity, window, beta=beta, allocation="official")
        assert layer_counts(official, layers, length) == kept[:layers]
        if kvpress[0] >= 0:
            assert 0 < ratio < 1
            share = Pyramid(1 - ratio, window, beta=beta, allocation="kvpress")
            assert layer_counts(share, layers, length) == kvpress[:layers]


def all_layers(case: Golden) -> None:
    case.ignore("L", "B", "Hq", "Hkv", "S", "D", "seeds")
    queries, keys, values = case["q_window"], case["k"], case["v"]
    layers, batch, _, seq_len, head_dim = keys.shape
    window = case.take("window")
    group = case.take("group_reduce").split(" ")[0]
    assert group in ("none", "mean", "max", "sum"), group
    method = create(
        "pyramidkv",
        budget=case.take("capacity"),
        window=window,
        kernel_size=case.take("kernel"),
        pool=case.choose("pooling", {"avgpool": "avg", "maxpool": "max"}),
        window_reduce=case.take("window_reduce"),
        group_reduce=group,
        beta=case.take("beta"),
        allocation="official",
    )
    pipeline, prefixes = Pipeline(method.stages(), layers), case["indices_prefix"]
    for index in range(layers):
        state = LayerState(index, layers, queries[index], keys[index], values[index], [seq_len] * batch, head_dim**-0.5)
        scores = method.stages().score(state)
        official = case["scores"][index]
        # float32 on both sides; a pooled sum of at most window probabilities
        assert torch.allclose(scores[:, :, : seq_len - window], official, rtol=1e-4, atol=1e-4 * official.max().item())
        store = pipeline.compress(state)
        count = int(case["kept"][index])
        assert store.lengths == [count + window] * batch
        size = batch * scores.shape[1] * count
        expected, prefixes = prefixes[:size].view(batch, -1, count).sort(-1).values, prefixes[size:]
        recent = torch.arange(seq_len - window, seq_len).expand(*expected.shape[:2], window)
        assert torch.equal(store.positions[:, :, : store.max_length], torch.cat([expected, recent], -1).int())
    assert prefixes.numel() == 0
