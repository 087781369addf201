"""H2O: column sums and kept sets at the end of the prefill, and of the decode steps with their outputs.

Sets are compared; kvpress and KVCache-Factory give the order of the scores. In the rolling cases keys are stored unrotated and
slot i is rotated to i at every step, which no store of ours does (`streaming_llm` has positions inside the cache): a prompt's
slots are its positions, so the prefill is that of rotated keys, and before each decode step the replay rotates the stored keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.layer import LayerState
from kvcompress.methods import Method, create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden
from tests.methods.replay.decoding import Decoding


def rotated(x: Tensor, base: float) -> Tensor:
    """RoPE at positions 0, 1, ..., halves rotated against each other (Llama)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def replay(case: Golden) -> None:
    case.ignore("B", "H", "Hq", "Hkv", "D")
    steps = case.take("T", 0)
    seq_len, variant = case.take("S"), case.take("variant", "official")
    if variant == "official":
        base, rolling = case.take("rope_base"), case.take("position_rolling")
        queries, keys = (case[f"{x}_raw"] if rolling else case[x] for x in "qk")
        if rolling:
            queries, keys = rotated(queries, base), rotated(keys, base)
        recent = case.take("recent_size")
        budget, parameters = case.take("hh_size") + recent, {"recent": recent}
        expected = case["kept"][None, 0, :, : int(case["n_kept"][0])]
    elif variant == "oneshot":
        queries, keys = case["q"], case["k"]
        recent, budget = case.take("window"), case.take("capacity")
        group = case.choose("group_reduce", {"mean": "mean", "max": "max", "sum": "sum", "none": "none"}, "none")
        parameters = {"recent": recent, "group_reduce": group}
        prefix = case["indices_prefix"].sort(-1).values
        tail = torch.arange(seq_len - recent, seq_len).expand(*prefix.shape[:2], recent)
        expected = torch.cat([prefix, tail], -1)
    else:
        assert variant == "kvpress", variant
        queries, keys, budget = case["q"], case["k"], case.take("n_kept")
        assert budget == max(1, int(seq_len * (1 - case.take("compression_ratio"))))
        parameters = {"recent": 0, "per_viewer": True}
        expected = case["indices"].sort(-1).values
    queries, keys = queries[:, :, :seq_len], keys[:, :, :seq_len]
    batch, _, _, head_dim = keys.shape
    method = create("h2o", budget=budget, **parameters)
    layer = LayerState(0, 1, queries, keys, keys, [seq_len] * batch, head_dim**-0.5)
    if "scores" in case.tensors:
        official = case["scores"]
        scores = method.stages().score(layer)[:, :, : official.shape[2]]
        # up to seq_len float32 probabilities in a sum
        assert torch.allclose(scores, official, rtol=seq_len * torch.finfo(torch.float32).eps, atol=1e-6)
    store = Pipeline(method.stages(), 1).compress(layer)
    assert store.lengths == [min(budget, seq_len)] * batch
    assert torch.equal(store.positions[:, :, : store.max_length], expected.int())
    if variant == "official":
        decode(case, create("h2o", budget=budget, **parameters, decode=True), seq_len, steps, base, rolling)


def decode(case: Golden, method: Method, length: int, steps: int, base: float, rolling: bool) -> None:
    q, k = (case[f"{x}_raw"] if rolling else case[x] for x in "qk")
    raw_k = k
    if rolling:
        q, k = rotated(q, base), rotated(k, base)
    run = Decoding(method, q, k, case["v"], length)
    for step in range(1, steps + 1):
        run.append()
        if rolling:
            entries = run.kept.shape[2]
            where = run.kept.long()[..., None].expand(-1, -1, -1, k.shape[3])
            run.store.keys[:, :, :entries] = rotated(raw_k.gather(2, where), base)
            position = length + step - 1
            run.q[:, :, position] = rotated(
                case["q_raw"][:, :, position : position + 1].expand(-1, -1, entries, -1), base
            )[:, :, -1]
        out = run.attend()
        # a softmax of float32 logits and a sum of its products with the values, in two orders; rolling: angles up to `length`
        assert torch.allclose(out[0], case["out"][step - 1], rtol=1e-4, atol=1e-4 if rolling else 1e-5), step
        run.pipeline.evict(run.store)
        assert torch.equal(run.kept[0], case["kept"][step, :, : int(case["n_kept"][step])]), step
    sums = run.store.beside["sums"][0, :, : run.store.max_length]
    # up to `length + steps` float32 probabilities in a sum
    assert torch.allclose(sums, case["score_final"], rtol=(length + steps) * torch.finfo(torch.float32).eps, atol=1e-5)
