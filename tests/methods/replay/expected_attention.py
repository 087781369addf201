"""Expected Attention: statistics of future queries, scores and kept sets.

Sinks are compared as "kept": official, the largest score plus 1; ours, +inf. The official queries come before RoPE and are
rotated here first, with frequencies read off the case's own cosines and sines.
"""

from __future__ import annotations

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from kvcompress.rotary import rerotate
from tests.methods.golden import Golden
from tests.reference.rotary import frequencies

EPS = torch.finfo(torch.float32).eps


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "S", "D")
    keys, values = case["k"], case["v"]
    batch, _, length, dim = keys.shape
    kept, sink = case.take("n_kept"), case.take("n_sink")
    assert kept == int(length * (1 - case.take("compression_ratio")))
    method = create(
        "expected_attention",
        budget=kept,
        n_future=case.take("n_future"),
        sink=sink,
        covariance=case.take("use_covariance"),
        value_norm=case.take("use_vnorm"),
        epsilon=case.take("epsilon"),
    )
    inv_freq = frequencies(case["cos"], case["sin"], first=length)
    queries = rerotate(case["query_pre"], torch.arange(length), inv_freq)
    layer = LayerState(0, 1, queries, keys, values, [length] * batch, dim**-0.5, inv_freq=inv_freq)
    score = method.stages().score

    # Means over `length` queries that were rotated there and back, in float32, and two rotations by matrices: the bound is
    # the number of roundings in a sum times the size of what is summed. Frequencies are good to eps a position.
    mean, covariance = score.future_queries(layer)
    roundings = EPS * 2 * (length + dim)
    size = queries.abs().max()
    assert torch.allclose(mean, case["mean_query"], rtol=0, atol=float(roundings * size))
    if covariance is not None:
        assert torch.allclose(covariance, case["cov_query"], rtol=0, atol=float(roundings * size**2))
    assert (covariance is not None) == ("cov_query" in case.tensors)

    # Scores are exponentials: an error of the exponent is a relative error of the score.
    group = queries.shape[1] // keys.shape[1]
    wide = keys.repeat_interleave(group, 1).abs()
    exponent = (wide @ case["mean_query"].abs()[..., None])[..., 0].max() * dim**-0.5
    if covariance is not None:
        exponent += ((wide @ case["cov_query"].abs()) * wide).sum(-1).max() / (2 * dim)
    scores = score(layer)
    assert torch.isposinf(scores[:, :, :sink]).all()
    assert (case["scores"][:, :, :sink] > case["scores"][:, :, sink:].max()).all()
    tolerance = float(2 * dim * EPS * (1 + exponent))
    assert torch.allclose(scores[:, :, sink:], case["scores"][:, :, sink:], rtol=tolerance, atol=0)

    store = Pipeline(method.stages(), 1).compress(layer)
    assert torch.equal(store.positions[:, :, : store.max_length], case["indices"])
