"""CurDKV: scores and kept sets, a mask where heads are adaptive.

Sinks are compared as "kept": official 1, ours +inf. The stored sketch replaces ours.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.methods.curdkv import RowEnergy
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden
from tests.methods.ragged import kept as kept_positions


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "S", "D")
    keys, values = case["k"], case["v"]
    batch, heads, length, dim = keys.shape
    kept, sink, columns = case.take("n_kept"), case.take("num_sinks"), case.take("r")
    assert kept == int(length * (1 - case.take("compression_ratio")))
    window = case.take("window")
    method = create(
        "curdkv",
        budget=kept,
        combine=case.choose("leverage_type", {name: name for name in ("key", "value", "kv_avg", "kv_product")}),
        local_window=window if case.take("use_local") else None,
        pad=case.choose("pad", {"back": "back", "front": "front"}),
        sketch=columns if case.take("use_random") else None,
        sink=sink,
        adaptive=case.take("ada_alpha", None),
    )
    stages = method.stages()
    if case.take("use_random"):
        assert case["g"].shape == (dim, columns)
        stages = replace(stages, score=sketched_by(case["g"], stages.score))
    layer = LayerState(0, 1, None, keys, values, [length] * batch, dim**-0.5)
    scores = stages.score(layer)
    assert torch.isposinf(scores[:, :, :sink]).all()
    assert (case["scores"][:, :, :sink] == 1).all()
    # sums of head_dim (times sketch) squares, of the window and of the sequence, each in two orders
    tolerance = 4 * (dim + columns + window + length) * torch.finfo(torch.float32).eps
    assert torch.allclose(scores[:, :, sink:], case["scores"][:, :, sink:], rtol=tolerance, atol=0)

    store = Pipeline(stages, 1).compress(layer)
    if method.adaptive is not None:
        mask = torch.zeros(batch, heads, length, dtype=torch.uint8)
        for row in range(batch):
            for head, held in enumerate(kept_positions(store, row)):
                mask[row, head, held] = 1
        assert torch.equal(mask, case["kept_mask"])
        return
    assert torch.equal(store.positions[:, :, : store.max_length], case["indices"])


def sketched_by(g: torch.Tensor, score: RowEnergy) -> RowEnergy:
    class Given(RowEnergy):
        def projection(self, head_dim: int) -> torch.Tensor:
            return g

    return Given(**{field.name: getattr(score, field.name) for field in fields(score)})
