"""What one layer's compression costs: scores -> topk -> compact_, together and each alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvcompress
from bench import peers
from bench.bench_score import EAGER_KEYS, passes
from bench.harness import Case, Work
from tests.cases import LAYER, WINDOWS, prompts

POOL = {"pool": "avg", "kernel_size": 5}
K = 1024


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    kvpress = peers.kvpress_snapkv()
    for batch, length in prompts(device, quick=quick):
        for window in WINDOWS:
            for lse in (False, True):
                yield step_case(device, batch, length, window, kvpress, lse=lse)


def step_case(device: torch.device, batch: int, length: int, window: int, kvpress, *, lse: bool) -> Case:
    heads, dim = LAYER.num_kv_heads, LAYER.head_dim

    def make():
        q = torch.randn(batch, LAYER.num_q_heads, window, dim, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(batch, heads, length, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
        row_sum = torch.full((batch, LAYER.num_q_heads, window), 10.0, device=device) if lse else None
        scores = kvcompress.window_scores(q, k, lse=row_sum, **POOL)
        return q, k, v, row_sum, scores, kvcompress.topk(scores, K, window=window)

    def step(x) -> None:
        scores = kvcompress.window_scores(x[0], x[1], lse=x[3], **POOL)
        kvcompress.compact_([x[1], x[2]], kvcompress.topk(scores, K, window=window))

    moved = 2 * batch * heads * K * dim * 2
    scoring = passes(batch, heads, window * LAYER.q_per_kv, dim, length, 2, lse=lse or device.type == "cpu")
    rows = batch * heads
    others, absent = {}, {}
    if not lse and batch * length <= EAGER_KEYS:
        others["torch"] = lambda x: peers.torch_step(x[0], x[1], x[2], POOL["kernel_size"], K)
        if isinstance(kvpress, str):
            absent["kvpress"] = kvpress
        else:
            others["kvpress"] = lambda x: kvpress[1](x[0], x[1], x[2], POOL["kernel_size"], K)
    elif not lse:
        absent = dict.fromkeys(("torch", "kvpress"), "writes the map: tens of GiB at this size")
    return Case(
        op="step" + (", lse given" if lse else ""),
        label=f"B{batch} S{length} W{window} k {K}",
        make=make,
        variants={
            "kvcompress": step,
            "kvcompress.window_scores alone": lambda x: kvcompress.window_scores(x[0], x[1], lse=x[3], **POOL),
            "kvcompress.topk alone": lambda x: kvcompress.topk(x[4], K, window=window),
            "kvcompress.compact_ alone": lambda x: kvcompress.compact_([x[1], x[2]], x[5]),
            **others,
        },
        absent=absent,
        passes=[*scoring, Work(4 * rows * length, 4 * rows * K, cached=True), Work(moved, moved)],
        footprint=2 * batch * heads * length * dim * 2,
        tests=("window_scores", "topk", "compact_"),
        graph=True,
        core=True,
        params={"batch": batch, "seq_len": length, "window": window, "k": K, "dtype": "bfloat16"},
    )
