"""DBudgetKV: number of entries and kept sets, by position and by attention.

Official storage is per query head; by position all heads keep one set, which is compared with the one of each kv head. The
cases of mode `full_norm` use metrics on the full S x S map, which are not offered: of them only what the file says about
itself is checked.
"""

from __future__ import annotations

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "S", "D")
    if case.take("mode") == "full_norm":
        return full_norm(case)
    assert case.take("metric") == "last_token_attn"
    queries, keys = case["q"], case["k"]
    batch, _, seq_len, head_dim = keys.shape
    sink, window, share = case.take("sinks"), case.take("window"), case.take("attn_p")
    case.take("normalize")  # the rule is relative, so a factor of all rows changes nothing
    parameters = {
        "budget": case.take("capacity"),
        "threshold": case.take("threshold"),
        "observed": max(share, 0.0),
        "causal": False,
    }
    if case.take("mode") == "position":
        assert window == 0
        method = create("dbudgetkv", sink=sink, **parameters)
    else:
        assert case.take("mode") == "h2o"
        assert sink == 0
        order = create("snapkv", budget=1.0, window=window, pool="none", group_reduce="none")
        method = create("dbudgetkv", inner=order, **parameters)
    layer = LayerState(0, 1, queries, keys, keys, [seq_len] * batch, head_dim**-0.5)
    store = Pipeline(method.stages(), 1).compress(layer)
    kept, expected = store.positions[:, :, : store.max_length], case["kept"].sort(-1).values
    assert store.lengths == [case.take("n_kept")] * batch
    repeats = expected.shape[1] // kept.shape[1]
    assert torch.equal(kept.repeat_interleave(repeats, 1), expected)


def full_norm(case: Golden) -> None:
    assert case.take("metric") in ("norm-fro", "norm-1", "norm-inf", "norm-2")
    assert 0 <= case.take("threshold") < 1
    order, cut = case["order"], int(case["cut"])
    seq_len = case["attn"].shape[-1]
    for head, evicted in enumerate(order[:, : max(cut, 0)]):
        stay = torch.ones(seq_len, dtype=torch.bool)
        stay[evicted.long()] = False
        left = stay.nonzero()[:, 0]
        kept = case["kept"][head].sort().values
        assert torch.equal(kept, left[torch.isin(left, order[head])].int())
