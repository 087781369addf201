"""MorphKV: kept positions after every decode step, and the steps' outputs.

Grouped queries replay with the official order of cuts (``official_order=True``), which our default does not have; without
groups, and at the first step, both are the same, and both are replayed.
"""

from __future__ import annotations

import torch

from kvcompress.methods import create
from tests.methods.golden import Golden
from tests.methods.replay.decoding import Decoding


def replay(case: Golden) -> None:
    case.ignore("D")
    q, k, v = case["q"], case["k"], case["v"]
    length, steps = case.take("S"), case.take("steps")
    grouped = case.take("Hq") != case.take("Hkv")
    method = {
        "budget": case.take("max_capacity"),
        "window": case.take("window"),
        "fuse": case.choose("kind", {"sum_fused": "sum", "max_fused": "max"}),
        "evict_after": case.take("evict_after"),
    }
    for official_order in (True, False):
        run = Decoding(create("morphkv", **method, official_order=official_order), q, k, v, length)
        for step in range(1, steps + 1):
            out = run.step()
            assert torch.equal(run.kept[0], case[f"kept_step{step}"]), (official_order, step)
            if grouped and not official_order:
                break  # the output differs already: each query head attends with a set of its own
            # a softmax of float32 logits and a sum of its products with the values, in two orders
            assert torch.allclose(out[0], case["out"][step - 1], rtol=1e-4, atol=1e-5), (official_order, step)
