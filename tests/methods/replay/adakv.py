"""AdaKV: scores, entries of each head, kept sets, packed rows, and the step behind them: append and ragged attention.

The official integers are `rounding="official"`. Rows are compared by position; inside a head the official order is that of the
scores. kvpress, which only masks, is compared by its mask, from the scores that the case gives.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from kvcompress.heads import AdaptiveHeads
from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from kvcompress.select import topk_ragged
from tests.methods.golden import Golden
from tests.methods.ragged import assert_rows

EPS = torch.finfo(torch.float32).eps


def replay(case: Golden) -> None:
    case.choose("variant", {"official": official, "kvpress": kvpress}, "official")(case)


def official(case: Golden) -> None:
    case.ignore("Hq", "Hkv", "Hs", "S", "D", "prefix_base")
    assert case.take("order") == "window mean -> group reduce -> pool"
    window, per_kv_head = case.take("window"), case.take("gqa_support")
    parameters = {
        "budget": case.take("capacity"),
        "window": window,
        "kernel_size": case.take("kernel"),
        "pool": case.choose("pooling", {"avgpool": "avg", "maxpool": "max"}),
        "window_reduce": "mean",
        "group_reduce": case.choose("group_reduce", {name: name for name in ("mean", "max", "none")}),
    }
    assert per_kv_head == (parameters["group_reduce"] != "none")
    beta = case.take("pyram_beta")
    if case.take("pyram"):
        inner = create("pyramidkv", **parameters, beta=beta, allocation="adakv")
    else:
        inner = create("snapkv", **parameters)
    method = create(
        "adakv",
        budget=parameters["budget"],
        inner=inner,
        floor=case.take("floor_alpha"),
        normalise=bool(case.take("normalize")),
        skip=case.take("skip"),
        rounding="official",
    )
    keys, values = case["k"], case["v"]
    seq_len, dim = keys.shape[2:]
    layer = LayerState(
        case.take("layer"), case.take("num_layers"), case["q_window"], keys, values, [seq_len], dim**-0.5
    )
    stages = method.stages()
    store = Pipeline(stages, layer.num_layers).compress(layer)
    lens = case["head_lens"].tolist()
    assert store.head_lengths == [lens]
    assert case["cu_klen"].tolist() == [0, *accumulate(lens)]
    if not case.take("compressed"):
        assert store.is_complete
        return
    scores = stages.score(layer)[:, :, : seq_len - window]
    expected = case["scores"]
    # a pooled mean of window probabilities: head_dim roundings of a logit, and the sums
    loose = 4 * EPS * (dim + window + seq_len)
    assert torch.allclose(scores, expected, rtol=loose, atol=loose * expected.max().item())
    assert case["head_capacity"].tolist() == [n - window for n in lens]

    prefixes = case["indices_prefix"].tolist()
    positions, start = [], 0
    for n in lens:
        positions.append(prefixes[start : start + n - window] + list(range(seq_len - window, seq_len)))
        start += n - window
    assert start == len(prefixes)
    assert_rows(store, {"keys": case["k_flat"], "values": case["v_flat"]}, positions)
    if "q_new" in case.tensors:
        step(case, store, positions)


def step(case: Golden, store, positions: list[list[int]]) -> None:
    store.append(case["k_new"][None, :, None], case["v_new"][None, :, None])
    lens = case["head_lens2"].tolist()
    assert store.head_lengths == [lens]
    assert case["cu_klen2"].tolist() == [0, *accumulate(lens)]
    for head in positions:
        head.append(store.seen[0] - 1)
    assert_rows(store, {"keys": case["k_flat2"], "values": case["v_flat2"]}, positions)
    dim = case["q_new"].shape[1]
    out = store.attend(case["q_new"][None, :, None], softmax_scale=dim**-0.5)[0, :, 0]
    # float64 rounded once, against float32: head_dim roundings of a logit, a weighted mean of the values
    loose = 2 * EPS * (dim + max(lens)) * float(case["v_flat2"].abs().max())
    assert torch.allclose(out, case["attn_out"], rtol=0, atol=loose)


def kvpress(case: Golden) -> None:
    case.ignore("B", "Hkv", "S")
    scores = case["scores"]
    batch, _, seq_len = scores.shape
    kept = case.take("n_kept")
    assert kept == int(seq_len * (1 - case.take("compression_ratio")))
    heads = AdaptiveHeads(floor=case.take("alpha_safeguard"), rounding="safeguard")
    counts = heads(scores, [kept] * batch)
    index, indptr = topk_ragged(scores, counts, total=int(counts.sum()))
    mask = torch.zeros(scores.shape, dtype=torch.uint8)
    for row, columns in zip(mask.view(-1, seq_len), index.tensor_split(indptr[1:-1].long())):
        row[columns.long()] = 1
    assert torch.equal(mask, case["keep"])
