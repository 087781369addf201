"""Selection ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvcompress
from bench import peers
from bench.harness import Case
from tests.cases import LAYER, SCORES, TOPK_ROWS, budgets, prompts


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

    for batch, length in prompts(device, quick=quick):
        yield head_counts_case(device, batch, length)
        yield topk_ragged_case(device, batch, length)


def sweep(device: torch.device) -> Iterator[Case]:
    """32 MiB of scores each time, whatever their shape."""
    size = 2**23
    for rows in (4, 7, 8, 16, 32, 33, 64, 65, 100, 128, 131, 133, 200, 256, 265, 500, 1000, 2048, 8192):
        yield rows_case(device, "rows", rows, rows, size // rows, min(1024, size // rows // 4))
    for k in (1, 2, 16, 100, 1000, 1023, 1025, 4096, 10000, 32768, 65536, 100000, 131071):
        yield rows_case(device, "k", k, 64, 131072, k)
    for extra in (-100, -1, 1, 2, 3, 77):
        yield rows_case(device, "entries beyond 131072", extra, 64, 131072 + extra, 1024)


def rows_case(device: torch.device, swept: str, value: int, rows: int, length: int, k: int) -> Case:
    return Case(
        op="topk",
        label=f"{swept} {value}",
        make=lambda: torch.randn(1, rows, length, device=device),
        variants={"kvcompress": lambda x: kvcompress.topk(x, k)},
        read=4 * rows * length,
        written=4 * rows * k,
        footprint=4 * rows * length,
        params={"swept": swept, "value": value, "rows": rows, "seq_len": length, "k": k},
    )


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
        captured=("flashinfer",),
        core=True,
        absent=absent,
        params={"rows": rows, "seq_len": length, "k": k, "scores": kind},
    )


def uneven_scores(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """[batch, heads, seq_len], some heads with far more to keep than others."""
    scale = torch.linspace(0.5, 2, LAYER.num_kv_heads, device=device)[:, None]
    return scale * torch.randn(batch, LAYER.num_kv_heads, length, device=device)


def head_counts_case(device: torch.device, batch: int, length: int) -> Case:
    heads, total = LAYER.num_kv_heads, LAYER.num_kv_heads * 1024

    def make():
        on = {"dtype": torch.int32, "device": device}
        totals, floors = torch.full((batch,), total, **on), torch.full((batch, heads), 200, **on)
        return uneven_scores(batch, length, device), totals, floors

    def in_torch(x) -> torch.Tensor:  # no floors: torch has no form of them
        best = x[0].flatten(1).topk(total, sorted=False).indices // length
        return torch.zeros(batch, heads, dtype=torch.int64, device=device).scatter_add_(1, best, torch.ones_like(best))

    return Case(
        op="head_counts",
        label=f"B{batch} S{length} 1024 a head",
        make=make,
        variants={
            "kvcompress": lambda x: kvcompress.head_counts(x[0], x[1]),
            "kvcompress, floors": lambda x: kvcompress.head_counts(x[0], x[1], floors=x[2]),
            "torch.topk + count": in_torch,
        },
        read=4 * batch * heads * length,
        footprint=4 * batch * heads * length,
        graph=True,
        params={"batch": batch, "seq_len": length, "k": 1024},
    )


def topk_ragged_case(device: torch.device, batch: int, length: int) -> Case:
    heads, total = LAYER.num_kv_heads, batch * LAYER.num_kv_heads * 1024

    def make():
        scores = uneven_scores(batch, length, device)
        totals = torch.full((batch,), heads * 1024, dtype=torch.int32, device=device)
        return scores, kvcompress.head_counts(scores, totals)

    def in_torch(x) -> torch.Tensor:
        """Rank of every entry in its head, those below the head's count; waits for the device to size its result."""
        order = x[0].argsort(-1, descending=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=device).expand_as(order))
        return (rank < x[1][..., None]).nonzero()[:, 2]

    return Case(
        op="topk_ragged",
        label=f"B{batch} S{length} 1024 a head on average",
        make=make,
        variants={
            "kvcompress": lambda x: kvcompress.topk_ragged(x[0], x[1], total=total),
            "torch, sort and nonzero": in_torch,
        },
        read=4 * batch * heads * length,
        written=4 * total,
        footprint=4 * batch * heads * length,
        params={"batch": batch, "seq_len": length, "k": 1024},
    )
