"""Knorm: kept sets, kept rows, and the scores where the case has them.

Not compared: the order of rows inside a head (official: ascending norm; ours: ascending position).
"""

from __future__ import annotations

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden


def replay(case: Golden) -> None:
    if "keep_ratio" in case:
        official(case)
    else:
        kvpress(case)


def official(case: Golden) -> None:
    keys, values = case["keys"], case["values"]
    layers, batch, _, length, _ = keys.shape
    skip, prune_after = case.take("skip_layers"), case.take("prune_after")
    method = create(
        "knorm",
        budget=float(case.take("keep_ratio")),
        skip_layers=tuple(skip),
        prune_after=prune_after,
        rounding="ceil",
    )
    tokens = case.take("tokens_to_keep")
    for index in range(layers):
        layer = LayerState(index, layers, None, keys[index], values[index], [length] * batch, 1.0)
        whole = index in skip or length < prune_after
        official = [case[f"{name}_{index}"] for name in ("kept", "keys_out", "values_out")]
        compare(layer, method, length if whole else tokens, *official)


def kvpress(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "S", "D")
    keys, values = case["keys"], case["values"]
    batch, _, length, dim = keys.shape
    kept = case.take("n_kept")
    assert kept == max(1, int(length * (1 - case.take("compression_ratio"))))
    method = create("knorm", budget=kept, skip_layers=())
    layer = LayerState(0, 1, None, keys, values, [length] * batch, 1.0)
    compare(layer, method, kept, case["kept"], case["keys_out"], case["values_out"])
    # float32 sums of head_dim squares, in two orders: head_dim roundings each
    scores = method.stages().score(layer)
    assert torch.allclose(scores, case["scores"], rtol=2 * dim * torch.finfo(torch.float32).eps, atol=0)


def compare(layer, method, count, kept, keys_out, values_out) -> None:
    store = Pipeline(method.stages(), 1).compress(layer)
    assert store.lengths == [count] * store.batch
    positions = store.positions[:, :, :count].long()
    assert torch.equal(positions, kept)
    where = positions[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
    for stored, source, official in ((store.keys, layer.keys, keys_out), (store.values, layer.values, values_out)):
        assert torch.equal(stored[:, :, :count], source.gather(2, where))
        assert sorted(official.flatten(0, 2).tolist()) == sorted(stored[:, :, :count].flatten(0, 2).tolist())
