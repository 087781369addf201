"""KeyDiff: scores of the one-shot form, kept sets of both forms."""

from __future__ import annotations

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "S", "D")
    keys = case["k"]
    batch, _, length, dim = keys.shape
    kept = case.take("n_kept")
    assert kept == int(length * (1 - case.take("compression_ratio")))
    method = create("keydiff", budget=kept, block_size=case.take("block_size"))
    layer = LayerState(0, 1, None, keys, keys, [length] * batch, 1.0)
    store = Pipeline(method.stages(), 1).compress(layer)
    assert store.lengths == [kept] * batch
    assert torch.equal(store.positions[:, :, :kept], case["indices"])
    if "scores" in case.tensors:
        # a cosine of unit vectors: head_dim products, and an anchor that is a mean of `length` rows, in two orders
        tolerance = 2 * (dim + length) * torch.finfo(torch.float32).eps
        assert torch.allclose(method.stages().score(layer), case["scores"], rtol=0, atol=tolerance)
