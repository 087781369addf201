"""LAVa: value norms, scores, entropies, every intermediate layer budget, final entries of each head, kept sets and rows.

`compat=True` gives the official integers. With `normalize` the official code weighs the heads of a layer at its first re-cut and keeps
that order, ours at each cut: there the heads' entries are made from ours (`frozen`), and so is what they keep.
"""

from __future__ import annotations

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from kvcompress.select import topk_ragged
from tests.methods.golden import Golden
from tests.methods.ragged import assert_rows, kept

EPS = torch.finfo(torch.float32).eps


def replay(case: Golden) -> None:
    case.ignore("Hq", "Hkv", "S", "D")
    assert case.take("order") == "window mean -> pool -> times value norm -> group max"
    assert case.take("gqa_support")
    layers, window, normalise = case.take("L"), case.take("window"), bool(case.take("normalize"))
    method = create(
        "lava",
        budget=case.take("capacity"),
        window=window,
        kernel_size=case.take("kernel"),
        pool=case.choose("pooling", {"avgpool": "avg", "maxpool": "max"}),
        floor=case.take("floor_alpha"),
        normalise=normalise,
        compat=True,
    )
    stages, (_, _, heads, seq_len, dim) = method.stages(), case["k"].shape
    prefix = seq_len - window
    states = [
        LayerState(i, layers, case["q_window"][i], case["k"][i], case["v"][i], [seq_len], dim**-0.5)
        for i in range(layers)
    ]
    norms = torch.cat([stages.score.value_norm(state) for state in states])
    assert torch.allclose(norms, case["value_norm"], rtol=EPS * dim, atol=0)
    scores = [stages.score(state) for state in states]
    loose = 4 * EPS * (dim + window + seq_len)
    for ours, official in zip(scores, case["scores"]):
        assert torch.allclose(ours[0, :, :prefix], official, rtol=loose, atol=loose * official.max().item())
    entropies = [stages.budget.measure(state, lambda s=s: s) for state, s in zip(states, scores)]
    # float32 sums of heads * prefix terms
    assert torch.allclose(torch.cat(entropies).float(), case["entropy"], rtol=EPS * heads * prefix, atol=0)

    trace = case["budget_trace"].tolist()
    for last in range(layers):
        settled = stages.budget.settle(entropies[: last + 1], [seq_len], floor=window, layers=layers)
        assert [row[0] - window for row in settled] == [min(n, prefix) for n in trace[last][: last + 1]]

    pipeline = Pipeline(stages, layers)
    stores = [pipeline.compress(state) for state in states]
    lens, indices, rows = case["head_lens"].tolist(), case["indices_prefix"].tolist(), case["k_flat"]
    for i, store in enumerate(stores):
        positions = []
        for n in lens[i]:
            positions.append(indices[: n - window] + list(range(prefix, seq_len)))
            indices = indices[n - window :]
        flat, rows = rows[: sum(lens[i])], rows[sum(lens[i]) :]
        if normalise:
            chosen = frozen(stages, scores[i], [row[i] for row in trace], prefix, window)
            assert chosen == [sorted(head) for head in positions]
        else:
            assert store.head_lengths == [lens[i]]
            assert_rows(store, {"keys": flat}, positions)
        assert all(head[-window:] == list(range(prefix, seq_len)) for head in kept(store))
    assert not indices
    assert not rows.numel()


def frozen(stages, scores: torch.Tensor, budgets: list[int], prefix: int, window: int) -> list[list[int]]:
    """Positions by the official order of cuts: weights of the first cut, then those of the second for all later ones."""
    cuts: list[int] = []
    for budget in budgets:
        if 0 <= budget <= (cuts[-1] if cuts else prefix):
            cuts.append(budget)
    counts = stages.heads(scores, [cuts[0] + window])
    if len(cuts) > 1:
        counts = counts.minimum(stages.heads(scores, [cuts[-1] + window], weighed_at=[cuts[1] + window]))
    index, indptr = topk_ragged(scores, counts, total=int(counts.sum()))
    return [head.tolist() for head in index.tensor_split(indptr[1:-1].long())]
