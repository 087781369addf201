"""OBCache: scores per query head before pooling, and kept sets, at the end of the prefill and of the decode steps."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden
from tests.methods.replay.decoding import Decoding

KINDS = {(True, False): "value", (False, True): "key", (True, True): "joint"}


def replay(case: Golden) -> None:
    case.ignore("method", "B", "Hq", "Hkv", "D", "cache_ratio")  # a ratio is how num_heavy came about
    seq_len = case.take("S")
    assert case.take("path") in ("eager", "flash")  # two ways to the same numbers
    queries, keys, values = (case[name][:, :, :seq_len] for name in "qkv")
    recent, heavy, window = case.take("num_recent"), case.take("num_heavy"), case.take("window")
    latest_only, steps = case.take("latest_only"), case.take("steps")
    if latest_only:  # TOVA's form does not accumulate: the newest query alone
        window = 1
    parameters = dict(
        budget=recent + heavy,
        kind=KINDS[case.take("use_v"), case.take("use_k")],
        window=window,
        recent=recent,
        sink=case.take("num_sink"),
        p=case.take("p"),
        value_norm=case.take("use_vnorm"),
        cross=case.take("use_cross"),
        pool=case.choose("pool", {None: "none", "maxpool": "max", "avgpool": "avg"}),
        group_reduce="none",
    )
    method = create("obcache", **parameters)
    batch, _, _, head_dim = keys.shape
    layer = LayerState(0, 1, queries, keys, values, [seq_len] * batch, head_dim**-0.5)
    official = case["score_prefill"]
    scores = replace(method.stages().score, pool="none")(layer)
    # squares of float32 probabilities of float32 logits, differences of squares of values
    assert torch.allclose(scores, official, rtol=1e-4, atol=1e-6 * official.abs().max().item())
    store = Pipeline(method.stages(), 1).compress(layer)
    assert store.lengths == [min(recent + heavy, seq_len)] * batch
    assert torch.equal(store.positions[:, :, : store.max_length], case["kept_prefill"])

    run = Decoding(
        create("obcache", **parameters, decode=True, latest_only=latest_only), case["q"], case["k"], case["v"], seq_len
    )
    for step in range(1, steps + 1):
        run.append()
        run.attend()
        if step == steps:
            official = case["score_last"]
            change = run.store.beside["change"][:, :, : run.store.max_length]
            assert torch.allclose(change, official, rtol=1e-4, atol=1e-6 * official.abs().max().item())
        run.pipeline.evict(run.store)
        assert torch.equal(run.kept, case[f"kept_step{step}"]), step
