"""TOVA: head means and kept sets at the end of the prefill and of the decode steps, with their outputs.

kvpress' indices are compared as sets; its order is that of the scores.
"""

from __future__ import annotations

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden
from tests.methods.replay.decoding import Decoding


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "D")
    steps, newest_evicted = case.take("T", 0), case.take("newest_evicted", 0)
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
    if not kvpress:
        assert decode(case, budget, seq_len, steps) == newest_evicted


def decode(case: Golden, budget: int, length: int, steps: int) -> int:
    """The decode steps; how often the newest token left at once."""
    run, left_at_once = Decoding(create("tova", budget=budget, decode=True), case["q"], case["k"], case["v"], length), 0
    for step in range(1, steps + 1):
        run.append()
        out = run.attend()
        # a softmax of float32 logits and a sum of its products with the values, in two orders
        assert torch.allclose(out, case["out"][step - 1], rtol=1e-4, atol=1e-5), step
        rank = run.pipeline.stages.decode.rank(run.store)
        mean = case["mean_attn"][step][:, None, : rank.shape[2]].expand_as(rank)
        assert torch.allclose(rank, mean, rtol=1e-5, atol=1e-7), step
        run.pipeline.evict(run.store)
        kept = case["kept"][step][:, None, : int(case["n_kept"][step])]
        assert torch.equal(run.kept, kept.expand_as(run.kept)), step
        left_at_once += int(length + step - 1 not in kept)
    return left_at_once
