"""ChunkKV: token scores, chunk scores and kept sets.

kvpress chooses by the first row for the whole batch; ours chooses row by row, so the first row is compared. Its number of
entries comes from its number of chunks, ``max(1, int(chunks * (1 - ratio)))`` in double arithmetic; ours takes it as the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress.budget import Uniform
from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.methods.chunkkv import Chunks
from kvcompress.pipeline import Pipeline
from kvcompress.select import TopK
from tests.methods.golden import Golden


@dataclass(frozen=True)
class Given:
    """Token scores that the case brings."""

    scores: Tensor
    by_position = False
    queries = 0

    def __call__(self, layer: LayerState) -> Tensor:
        return self.scores


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv")
    scores, expected = case["scores"], case["indices"].tolist()
    batch, heads, seq_len = scores.shape
    assert case.take("S") == seq_len
    head_dim, chunk, window, kernel = (case.take(x) for x in ("D", "chunk_length", "window", "kernel"))
    chunks = -(-seq_len // chunk)
    assert case.take("n_chunks_kept") == max(1, int(chunks * (1 - case.take("compression_ratio"))))

    base = case.choose("base", {"given": "given", "snap": "snap"})
    keys = case["k"] if base == "snap" else torch.zeros(batch, heads, seq_len, head_dim)
    queries = case["q_window"] if base == "snap" else None
    layer = LayerState(0, 1, queries, keys, keys, [seq_len] * batch, head_dim**-0.5)

    # float32 means of at most chunk * heads numbers
    given = Chunks(Given(scores), chunk)
    ours = given(layer)
    assert torch.equal(ours, ours[:, :1].expand_as(ours))
    assert torch.allclose(ours[0, 0, ::chunk], case["chunk_scores"], rtol=1e-5, atol=1e-6)
    stages = replace(create("chunkkv", budget=1.0).stages(), score=given, budget=Uniform(len(expected)), select=TopK())
    store = Pipeline(stages, 1).compress(layer)
    assert store.lengths == [len(expected)] * batch
    assert store.positions[0, :, : len(expected)].tolist() == [expected] * heads

    if base == "snap":
        inner = create(
            "snapkv", budget=1.0, window=window, kernel_size=kernel, pool="avg", window_reduce="mean", pool_first=True
        )
        prefix = inner.stages().score(layer)[:, :, : seq_len - window]
        assert torch.allclose(prefix, scores[:, :, : seq_len - window], rtol=1e-4, atol=1e-7)
        if len(expected) >= window + 2 * chunk:  # below, some of the chunks that touch the window may not all fit
            method = create("chunkkv", budget=len(expected), chunk=chunk, inner=inner)
            store = Pipeline(method.stages(), 1).compress(layer)
            assert store.positions[0, :, : len(expected)].tolist() == [expected] * heads
