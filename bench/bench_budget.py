"""Budget ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import kvcompress
from bench.harness import Case
from kvcompress.budget import cumulative_mass
from tests.cases import prompts

HEADS = 32


def mass_by_sort(mass: torch.Tensor, share: float) -> torch.Tensor:
    held = cumulative_mass(mass)
    return 1 + (held.double() < share * held[..., -1:].double()).sum(-1)


def mass_case(device: torch.device, batch: int, length: int) -> Case:
    """Query heads of a layer: the mean attention that 32 queries pay."""

    def make():
        logits = 3 * torch.randn(batch, HEADS, 8, length, device=device)
        return [logits.softmax(-1).mean(2)]

    size = 4 * batch * HEADS * length
    return Case(
        op="mass_count",
        label=f"B{batch} S{length} {HEADS} heads",
        make=make,
        variants={
            "kvcompress": lambda x: kvcompress.mass_count(x[0], 0.9),
            "torch sort and cumsum": lambda x: mass_by_sort(x[0], 0.9),
        },
        read=size,
        footprint=size,
        params={"batch": batch, "heads": HEADS, "seq_len": length, "share": 0.9},
    )


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    for batch, length in prompts(device, quick=quick):
        yield mass_case(device, batch, length)
        for hidden in (4096, 8192):
            if batch > 1 and length > 32768:
                continue  # 17 GB a set

            def make(batch: int = batch, length: int = length, hidden: int = hidden):
                return [torch.randn(batch, length, hidden, device=device, dtype=torch.bfloat16) for _ in range(2)]

            size = 2 * batch * length * hidden
            yield Case(
                op="cosine_importance",
                label=f"B{batch} S{length} hidden {hidden}",
                make=make,
                variants={
                    "kvcompress": lambda x: kvcompress.cosine_importance(*x),
                    "kvcompress, residual add inside": lambda x: kvcompress.cosine_importance(*x, is_update=True),
                    "torch F.cosine_similarity": lambda x: F.cosine_similarity(*x, dim=-1).mean(-1),
                },
                read=2 * size,
                footprint=2 * size,
                core=batch == 1,
                params={"batch": batch, "seq_len": length, "hidden": hidden, "dtype": "bfloat16"},
            )


def sweep(device: torch.device) -> Iterator[Case]:
    """128 MiB of hidden states each time, whatever their shape."""
    for hidden in (64, 500, 512, 896, 1536, 2048, 2880, 3584, 4095, 4096, 4097, 5120, 6144, 8192, 12288, 16384):
        yield states_case(device, "hidden", hidden, hidden=hidden)
    for batch in (1, 2, 7, 64, 1000):
        yield states_case(device, "batch", batch, batch=batch)
    for extra in (-77, -1, 1, 3):
        yield states_case(device, "entries beyond 8192", extra, extra=extra)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield states_case(device, "dtype", str(dtype).removeprefix("torch."), dtype=dtype)


def states_case(device, swept, value, *, hidden=4096, batch=1, extra=0, dtype=torch.bfloat16) -> Case:
    length = 2**26 // (batch * hidden * dtype.itemsize) + extra
    size = 2 * batch * length * hidden * dtype.itemsize
    return Case(
        op="cosine_importance",
        label=f"{swept} {value}",
        make=lambda: [torch.randn(batch, length, hidden, device=device).to(dtype) for _ in range(2)],
        variants={"kvcompress": lambda x: kvcompress.cosine_importance(*x)},
        read=size,
        footprint=size,
        params={"swept": swept, "value": value, "batch": batch, "seq_len": length, "hidden": hidden,
                "dtype": str(dtype).removeprefix("torch.")},
    )  # fmt: skip
