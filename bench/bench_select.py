"""Selection ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvcompress
from bench import peers
from bench.harness import Case
from tests.cases import LAYER, SCORES, TOPK_ROWS, budgets


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    flashinfer = peers.flashinfer_topk()
    shapes = TOPK_ROWS[:2] if quick or device.type == "cpu" else TOPK_ROWS
    for rows, length in shapes:
        for k in budgets(length):
            yield topk_case(device, rows, length, k, "random", flashinfer)
    for kind in SCORES:
        if kind != "random":
            yield topk_case(device, 8, 32768, 8192, kind, flashinfer)
            if device.type == "cuda" and not quick:
                yield topk_case(device, 64, 131072, 1024, kind, flashinfer)


def topk_case(device: torch.device, rows: int, length: int, k: int, kind: str, flashinfer: object) -> Case:
    variants = {
        "kvcompress": lambda x: kvcompress.topk(x, k),
        "torch.topk (any order)": lambda x: torch.topk(x, k, dim=-1, sorted=False).indices,
        "torch.topk + sort": lambda x: torch.topk(x, k, dim=-1, sorted=False).indices.sort(-1).values,
    }
    absent = {}
    if isinstance(flashinfer, str):
        absent["flashinfer"] = flashinfer
    elif device.type == "cuda":
        variants["flashinfer.top_k (any order)"] = lambda x: flashinfer(x, k)
    else:
        absent["flashinfer"] = "has no CPU form"
    return Case(
        op="topk",
        label=f"rows {rows} S{length} k {k}" + ("" if kind == "random" else f", {kind}"),
        make=lambda: SCORES[kind]((rows // LAYER.num_kv_heads, LAYER.num_kv_heads, length), device),
        variants=variants,
        read=4 * rows * length,
        written=4 * rows * k,
        footprint=4 * rows * length,
        graph=True,
        core=True,
        absent=absent,
        params={"rows": rows, "seq_len": length, "k": k, "scores": kind},
    )
