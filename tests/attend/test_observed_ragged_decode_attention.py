"""observed_ragged_decode_attention_: the same as the dense form, head by head."""

from __future__ import annotations

import pytest
import torch

import kvcompress
from tests import cases
from tests.attend.test_decode_attention import full
from tests.attend.test_ragged_decode_attention import pack
from tests.attend.test_ragged_decode_attention import wrong as wrong_plain
from tests.bad_inputs import Bad

NAN = float("nan")


def check(q, k, v, row_start, lengths, *, width=4, weights=None, **how):
    """Against the dense op, which stands against float64, on padded copies of the same heads."""
    total, heads, most = len(k), len(lengths), max(int(lengths.max()), 1)
    sums, history = torch.rand(total, device=k.device), torch.rand(total, width, device=k.device)
    seen = lengths + 9
    slot = row_start[:, None] + torch.arange(most, device=k.device)
    is_entry = torch.arange(most, device=k.device) < lengths[:, None]
    slot = torch.where(is_entry, slot, 0)

    def dense(x):
        return x[slot].unflatten(0, (len(q), -1)).contiguous()

    expected_sums, expected_rows = dense(sums), dense(history)
    dense_weights = None if weights is None else dense(weights)
    kvcompress.observed_decode_attention_(
        q,
        dense(k),
        dense(v),
        lengths=lengths.view(len(q), -1),
        sums=expected_sums,
        weights=dense_weights,
        history=expected_rows,
        seen=seen.view(len(q), -1),
        **how,
    )
    before = sums.clone(), history.clone()
    plain = kvcompress.ragged_decode_attention(q, k, v, row_start, lengths, max_length=most)
    got = kvcompress.observed_ragged_decode_attention_(
        q, k, v, row_start, lengths, max_length=most, sums=sums, weights=weights, history=history, seen=seen, **how
    )
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], plain[1])
    touched = torch.zeros(total, dtype=torch.bool, device=k.device)
    touched[slot[is_entry]] = True
    for ours, theirs, old in zip((sums, history), (expected_sums, expected_rows), before):
        assert torch.equal(ours[~touched], old[~touched])
        theirs = theirs.flatten(0, 1)
        for h in range(heads):
            start, n = int(row_start[h]), int(lengths[h])
            torch.testing.assert_close(ours[start : start + n], theirs[h, :n], rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("q_per_kv", [1, 4, 16])
def test_against_dense(dtype, num_queries, q_per_kv, device):
    args = pack([100, 0, 333, 1, 17, 64], q_per_kv, num_queries, 64, dtype, device, batch=2)
    check(*args, decay=0.5, group_reduce="max")
    check(*args, weights=torch.rand(len(args[1]), device=device), power=2, group_reduce="sum")


def test_one_head_with_ten_times_the_entries(device):
    check(*pack([10_000, *[1000] * 7], 4, 1, 128, torch.bfloat16, device))


def test_bitwise_run_to_run(device):
    q, k, v, row_start, lengths = pack([3000, 17, 900, 64], 4, 2, 128, torch.bfloat16, device)
    runs = []
    for _ in range(4):
        sums = torch.ones(len(k), device=device)
        kvcompress.observed_ragged_decode_attention_(q, k, v, row_start, lengths, max_length=3000, sums=sums)
        runs.append(sums)
    assert all(torch.equal(run, runs[0]) for run in runs)


def samples(device):
    q, k, v, row_start, lengths = pack([20, 0, 33, 7], 4, 2, 24, torch.bfloat16, device, batch=2)
    k, v = k.nan_to_num(), v.nan_to_num()
    sums, weights = torch.rand(len(k), device=device), torch.rand(len(k), device=device)
    history = torch.rand(len(k), 3, device=device)
    return [
        (q, k, v, row_start, lengths, sums, weights, history, lengths, 33, 0.2, 0.5, 2, 3),
        (q.float(), k.float(), v.float(), row_start, lengths, sums, None, None, None, 33, 0.2, 0.0, 1, 1),
    ]


def wrong(**changes):
    """The op's arguments on a device, all right but for `changes`."""

    def args(device):
        names = ("q", "k", "v", "row_start", "lengths", "max_length", "softmax_scale", "return_logits")
        plain = dict(zip(names, wrong_plain()(device)))
        total, stores = len(plain["k"]), len(plain["lengths"])
        good = {
            **{name: plain[name] for name in names[:5]},
            "sums": torch.ones(total, device=device),
            "weights": torch.ones(total, device=device),
            "history": torch.ones(total, 3, device=device),
            "seen": torch.ones(stores, dtype=torch.int32, device=device),
            "max_length": plain["max_length"],
            "softmax_scale": 0.25,
            "decay": 1.0,
            "power": 1,
            "group_reduce": 1,
        }
        good.update({name: change(device) if callable(change) else change for name, change in changes.items()})
        return tuple(good.values())

    return args


NAME = "observed_ragged_decode_attention_"
TOTAL = len(wrong_plain()("cpu")[1])
STORES = len(wrong_plain()("cpu")[4])
BAD = [
    Bad("rank_k", wrong(k=full(2, 20, 16)), f"{NAME}: k must be [total, head_dim], got 3D [2, 20, 16]"),
    Bad("max_length", wrong(max_length=-1), f"{NAME}: max_length must be from 0 to the rows of k ({TOTAL}), got -1"),
    Bad("sums_rank", wrong(sums=full(1, TOTAL)), f"{NAME}: sums must be [total], got 2D [1, {TOTAL}]"),
    Bad("sums", wrong(sums=full(TOTAL + 1)), f"{NAME}: sums must be of the rows of k ({TOTAL}), got [{TOTAL + 1}]"),
    Bad("weights", wrong(weights=full(3)), f"{NAME}: weights must be of the rows of k ({TOTAL}), got [3]"),
    Bad("history_rank", wrong(history=full(TOTAL)), f"{NAME}: history must be [total, width], got 1D [{TOTAL}]"),
    Bad(
        "history_dtype", wrong(history=full(TOTAL, 2, dtype=torch.int32)), f"{NAME}: history must be float32, got int32"
    ),
    Bad("no_seen", wrong(seen=None), f"{NAME}: seen must be there with history, got none"),
    Bad(
        "seen",
        wrong(seen=full(STORES + 1, dtype=torch.int32)),
        f"{NAME}: seen must be [batch * num_kv_heads] ({STORES}), got 1D [{STORES + 1}]",
    ),
    Bad("decay", wrong(decay=-0.5), f"{NAME}: decay must be from 0 to 1, got -0.500000"),
]
