"""LAQ and LAQ++: kept positions of both stages, a query head at a time, with the official mask; compared as sets.

The draft itself is not replayed (a model makes it): the golden gives its queries.
"""

from __future__ import annotations

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "D")
    length, ahead = case.take("S"), case["q_lookahead"]
    assert ahead.shape[2] == case.take("lookahead")
    name = case.choose("variant", {"LAQ": "laq", "LAQ++": "laqpp"})
    pool = {
        "pool": case.choose("pooling", {"maxpool": "max", "avgpool": "avg"}),
        "kernel_size": case.take("kernel"),
        "group_reduce": "none",
    }
    window = case.take("window_stage1")
    draft = create("snapkv", budget=case.take("capacity_stage1"), window=window, **pool)
    method = create(
        name, budget=case.take("capacity"), window=case.take("window_stage2"), draft=draft, mask="official", **pool
    )
    keys, queries = case["k"], case["q_window"]
    assert queries.shape[2] == window
    batch, _, _, head_dim = keys.shape
    layer = LayerState(
        0, 1, queries, keys, case["v"], [length] * batch, head_dim**-0.5, lookahead=ahead,
        lookahead_lengths=[ahead.shape[2]] * batch,
    )  # fmt: skip
    for one, expected in ((draft, case["kept_stage1"]), (method, case["kept_stage2"])):
        store = Pipeline(one.stages(), 1).compress(layer)
        kept = store.positions[:, :, : store.max_length]
        assert torch.equal(kept, expected.sort(-1).values), one
