"""TOVA: head means and kept sets at the end of the prefill.

Not replayed yet: the decode steps (`T` of them) of the official cases, which evict once every step: `kept`, `mean_attn`
and `n_kept` behind their first line, `out`, `newest_evicted`. kvpress' indices are compared as sets; its order is that of the
scores.
"""

from __future__ import annotations

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "D", "T", "newest_evicted")
    seq_len, kvpress = case.take("S"), case.choose("variant", {"kvpress": True, "official": False}, "official")
    keys, values = case["k"][:, :, :seq_len], case["v"][:, :, :seq_len]
    if kvpress:
        budget, queries = case.take("n_kept"), case["q_last"][:, :, None]
        assert budget == max(1, int(seq_len * (1 - case.take("compression_ratio"))))
        official, expected = case["scores"], case["indices"].sort(-1).values
    else:
        budget, queries = case.take("cache_size"), case["q"][:, :, seq_len - 1 : seq_len]
        official, expected = case["mean_attn"][0], case["kept"][0, :, : int(case["n_kept"][0])]
    batch, _, _, head_dim = keys.shape
    method = create("tova", budget=budget, window=int(kvpress))
    layer = LayerState(0, 1, queries, keys, values, [seq_len] * batch, head_dim**-0.5)
    scores = method.stages().score(layer)
    assert torch.equal(scores, scores[:, :1].expand_as(scores))  # one ranking for all heads
    # a probability of float32 logits; both sides round a few times
    assert torch.allclose(scores[:, 0, : official.shape[1]], official[:, :seq_len], rtol=1e-5, atol=1e-7)

    store = Pipeline(method.stages(), 1).compress(layer)
    assert store.lengths == [min(budget, seq_len)] * batch
    kept = store.positions[:, :, : store.max_length]
    assert torch.equal(kept, expected[:, None].expand_as(kept).int())
