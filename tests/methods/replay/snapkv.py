"""SnapKV: scores, kept sets and kept rows.

Not compared: the order of rows inside a head (official: descending score; ours: ascending position, attention does not care)
and, in bfloat16, the kept sets themselves: the official scores carry bfloat16 rounding, so near ties fall otherwise; there the
kept score mass must not be below the official one.
"""

from __future__ import annotations

import torch

from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden

REDUCE = {"none": "none", "mean": "mean", "max": "max", "sum": "sum"}
ORDERS = {
    "window reduce -> group reduce -> pool": (None, False),
    "window mean -> avg pool -> group mean": ("mean", True),
}


def replay(case: Golden) -> None:
    case.ignore("B", "Hq", "Hkv", "S", "D", "prefix_kept", "tie_safe")
    queries, keys, values = case["q_window"], case["k"], case["v"]
    batch, _, seq_len, head_dim = keys.shape
    window = case.take("window")
    order_reduce, pool_first = case.choose("order", ORDERS)
    group = "mean"  # kvpress names no reduction: its order says mean
    if "group_reduce" in case:
        group = REDUCE[case.take("group_reduce").split(" ")[0]]
    window_reduce = order_reduce or case.take("window_reduce", "sum")
    budget = case.take("n_kept") if "n_kept" in case else case.take("capacity")
    if "compression_ratio" in case:
        assert budget == max(1, int(seq_len * (1 - case.take("compression_ratio"))))
    method = create(
        "snapkv",
        budget=budget,
        window=window,
        kernel_size=case.take("kernel"),
        pool=case.choose("pooling", {"avgpool": "avg", "maxpool": "max"}),
        window_reduce=window_reduce,
        group_reduce=group,
        pool_first=pool_first,
    )
    layer = LayerState(0, 1, queries, keys, values, [seq_len] * batch, head_dim**-0.5)
    store = Pipeline(method.stages(), 1).compress(layer)
    kept = store.positions[:, :, : store.max_length]

    if not case.take("compressed", True):
        assert kept.shape[2] == seq_len
        return
    assert store.lengths == [min(budget, seq_len)] * batch
    low_precision = keys.dtype != torch.float32
    scores = method.stages().score(layer)[:, :, : seq_len - window]
    official = case["scores"].float()
    tolerance = 2 * torch.finfo(keys.dtype).eps * 4 if low_precision else 1e-4
    assert torch.allclose(scores, official, rtol=tolerance, atol=tolerance * official.max().item())

    if "indices" in case.tensors:
        expected = case["indices"].sort(-1).values.int()
    else:
        recent = torch.arange(seq_len - window, seq_len, dtype=torch.int32).expand(*kept.shape[:2], window)
        expected = torch.cat([case["indices_prefix"].sort(-1).values.int(), recent], -1)
    if low_precision:
        prefix = expected[..., :-window].long()
        ours = kept[..., :-window].long()
        assert (scores.gather(2, ours).sum(-1) >= scores.gather(2, prefix).sum(-1) - tolerance).all()
        return
    assert torch.equal(kept, expected)
    group_size = kept.shape[1] // keys.shape[1]
    for stored, source, name in ((store.keys, keys, "k_out"), (store.values, values, "v_out")):
        source = source.repeat_interleave(group_size, 1)
        where = kept.long()[..., None].expand(-1, -1, -1, head_dim)
        assert torch.equal(stored[:, :, : store.max_length], source.gather(2, where))
        if name in case.tensors:  # the official rows, sorted by position
            rows = (
                case["indices"] if "indices" in case.tensors else torch.cat([case["indices_prefix"].int(), recent], -1)
            )
            by_position = rows.argsort(-1)[..., None].expand(-1, -1, -1, head_dim)
            assert torch.equal(stored[:, :, : store.max_length], case[name].gather(2, by_position))
