"""Decode attention of one token and of several, plain and observed, dense and ragged, and the step's eviction; head_dim 128, bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvcompress
from bench.harness import Case, Work
from tests.cases import HEAD_DIMS

KV_HEADS, DIM = 8, 128
SHAPES = [  # batch, query heads per kv head, entries a head, new tokens
    (1, 4, 1024, 1),
    (1, 4, 8192, 1),
    (1, 8, 8192, 1),
    (1, 4, 32768, 1),
    (8, 4, 8192, 1),
    (8, 8, 8192, 1),
    (8, 4, 32768, 1),
    (8, 8, 32768, 1),
    (64, 4, 1024, 1),
    (1, 8, 8192, 8),
    (8, 8, 8192, 8),
]


@dataclass
class Inputs:
    q: Tensor
    k: Tensor  # dense; the ragged forms read the same memory as packed rows
    v: Tensor
    lengths: Tensor  # [batch], all full
    sums: Tensor  # [batch, kv heads, entries]
    even: tuple[Tensor, Tensor]  # row_start, lengths
    skewed: tuple[Tensor, Tensor]  # head 0 of every row has ten times the entries of the others
    longest: int

    @property
    def packed(self) -> tuple[Tensor, Tensor]:
        return self.k.view(-1, DIM), self.v.view(-1, DIM)


def inputs(device: torch.device, batch: int, q_per_kv: int, length: int, queries: int) -> Inputs:
    q = torch.randn(batch, KV_HEADS * q_per_kv, queries, DIM, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, KV_HEADS, length, DIM, device=device, dtype=torch.bfloat16) for _ in range(2))
    share = length * KV_HEADS // (KV_HEADS + 9)
    skewed = torch.tensor([length * KV_HEADS - share * (KV_HEADS - 1)] + [share] * (KV_HEADS - 1)).repeat(batch)
    even = torch.full_like(skewed, length)

    def store(lengths: Tensor) -> tuple[Tensor, Tensor]:
        return (lengths.cumsum(0) - lengths).to(device), lengths.int().to(device)

    full = torch.full((batch,), length, dtype=torch.int32, device=device)
    sums = torch.zeros(batch, KV_HEADS, length, device=device)
    return Inputs(q, k, v, full, sums, store(even), store(skewed), int(skewed.max()))


def sdpa(backend: SDPBackend) -> Callable[[Inputs], Tensor]:
    """The query heads of a kv head as query rows, which torch's backends split best; every new token sees all entries."""

    def run(x: Inputs) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(x.q.view(len(x.k), KV_HEADS, -1, DIM), x.k, x.v)

    return run


def plain(x: Inputs) -> object:
    return kvcompress.decode_attention(x.q, x.k, x.v, lengths=x.lengths)


def ragged(x: Inputs) -> object:
    return kvcompress.ragged_decode_attention(x.q, *x.packed, *x.skewed, max_length=x.longest)


def attention(device: torch.device, batch: int, q_per_kv: int, length: int, queries: int) -> Iterator[Case]:
    size = 2 * batch * KV_HEADS * length * DIM * 2
    label = f"B{batch} {length} entries a head, {q_per_kv} query heads" + f" x {queries} tokens" * (queries > 1)
    params = {"batch": batch, "entries": length, "q_per_kv": q_per_kv, "queries": queries, "dtype": "bfloat16"}

    def make() -> Inputs:
        return inputs(device, batch, q_per_kv, length, queries)

    peers = {"torch SDPA": lambda x: F.scaled_dot_product_attention(x.q.view(batch, KV_HEADS, -1, DIM), x.k, x.v)}
    if device.type == "cuda":
        peers = {
            "torch SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
            "torch SDPA, flash": sdpa(SDPBackend.FLASH_ATTENTION),
        }
    yield Case(
        op="decode_attention",
        label=label,
        make=make,
        variants={
            "kvcompress": lambda x: kvcompress.decode_attention(x.q, x.k, x.v),
            "kvcompress, lengths": plain,
            "kvcompress, ragged, equal heads": lambda x: kvcompress.ragged_decode_attention(
                x.q, *x.packed, *x.even, max_length=length
            ),
            "kvcompress, ragged 10 : 1": ragged,
            **peers,
        },
        tests=("decode_attention", "ragged_decode_attention"),
        read=size,
        footprint=size,
        graph=True,
        core=True,
        params=params,
    )
    yield Case(
        op="observed_decode_attention_",
        label=f"{label}, column sums",
        make=make,
        variants={
            "kvcompress": lambda x: kvcompress.observed_decode_attention_(
                x.q, x.k, x.v, lengths=x.lengths, sums=x.sums
            ),
            "kvcompress, ragged 10 : 1": lambda x: kvcompress.observed_ragged_decode_attention_(
                x.q, *x.packed, *x.skewed, max_length=x.longest, sums=x.sums.view(-1)
            ),
            "kvcompress, not observed": plain,
            "kvcompress, ragged 10 : 1, not observed": ragged,
        },
        tests=("observed_decode_attention_", "observed_ragged_decode_attention_"),
        read=size + 4 * batch * KV_HEADS * length,
        written=4 * batch * KV_HEADS * length,
        footprint=size,
        graph=True,
        params=params,
    )


def eviction(device: torch.device, batch: int, capacity: int) -> Case:
    """One new token into a full store, victims by score; beside it the same in torch: argmin and two scatters."""

    def make() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
        buffers, rows = (
            [torch.randn(batch, KV_HEADS, n, DIM, device=device, dtype=torch.bfloat16) for _ in range(2)]
            for n in (capacity, 1)
        )
        positions = torch.arange(capacity, dtype=torch.int32, device=device).repeat(batch, KV_HEADS, 1)
        lengths = torch.full((batch, KV_HEADS), capacity, dtype=torch.int32, device=device)
        return buffers, rows, positions, lengths, lengths.clone(), torch.rand(batch, KV_HEADS, capacity, device=device)

    def ours(x) -> object:
        return kvcompress.evict_append_(*x[:5], scores=x[5], sink=4, window=32)

    def in_torch(x) -> None:
        buffers, rows, positions, _, seen, scores = x
        stays = (positions < 4) | (positions >= seen[..., None] - 32)
        slot = scores.masked_fill(stays, float("inf")).argmin(-1, keepdim=True)
        for buffer, row in zip(buffers, rows):
            buffer.scatter_(2, slot[..., None].expand_as(row), row)
        positions.scatter_(2, slot, seen[..., None])
        scores.scatter_(2, slot, 0.0)
        seen.add_(1)

    return Case(
        op="evict_append_",
        label=f"B{batch} a full store of {capacity}",
        make=make,
        variants={"kvcompress": ours, "torch argmin + scatter": in_torch},
        read=batch * KV_HEADS * (8 * capacity + 4 * DIM),
        written=batch * KV_HEADS * 4 * DIM,
        footprint=4 * batch * KV_HEADS * capacity * DIM,
        graph=True,
        params={"batch": batch, "capacity": capacity},
    )


def ranking(device: torch.device, capacity: int, width: int) -> Case:
    """What the last `width` queries think of the entries of a layer, alone and with the eviction by it; torch's softmax and sum."""

    def make() -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        history = torch.randn(1, KV_HEADS, capacity, width, device=device)
        positions = torch.arange(capacity, dtype=torch.int32, device=device).repeat(1, KV_HEADS, 1)
        full = torch.full((1, KV_HEADS), capacity, dtype=torch.int32, device=device)
        buffers, rows = (
            [torch.randn(1, KV_HEADS, n, DIM, device=device, dtype=torch.bfloat16) for _ in range(2)]
            for n in (capacity, 1)
        )
        return history, positions, full, full.clone(), buffers, rows

    def evict(x) -> object:
        return kvcompress.evict_append_(*x[4:6], *x[1:4], history=x[0], fuse="sum", window=width)

    return Case(
        op="history_scores",
        label=f"B1 {capacity} entries, {width} queries",
        make=make,
        variants={
            "kvcompress": lambda x: kvcompress.history_scores(*x[:4], window=width),
            "torch softmax + sum": lambda x: x[0][:, :, :-width].softmax(2).sum(3),
            "kvcompress.evict_append_, by history": evict,
        },
        read=4 * KV_HEADS * capacity * (width + 1),
        written=4 * KV_HEADS * capacity,
        footprint=4 * KV_HEADS * capacity * width,
        graph=True,
        params={"capacity": capacity, "width": width},
    )


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    is_short = quick or device.type == "cpu"
    for shape in SHAPES[1:2] if is_short else SHAPES:
        yield from attention(device, *shape)
    for batch, capacity in [(1, 1025)] if is_short else [(1, 1025), (8, 1025), (1, 8193)]:
        yield eviction(device, batch, capacity)
    yield ranking(device, 1025, 32)


def sweep(device: torch.device) -> Iterator[Case]:
    """64 MiB of keys and values each time, whatever their shape."""
    for ragged in (False, True):
        for dim in HEAD_DIMS:
            yield shape_case(device, "head_dim", dim, ragged=ragged, dim=dim)
        for group in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16):
            yield shape_case(device, "q_per_kv", group, ragged=ragged, group=group)
        for queries in (1, 2, 3, 4, 8):
            yield shape_case(device, "queries", queries, ragged=ragged, queries=queries)
        for heads in (1, 2, 3, 5, 7, 8, 16, 31, 64, 128, 512):
            yield shape_case(device, "kv heads", heads, ragged=ragged, heads=heads)
        for extra in (-63, -1, 1, 3, 127):
            yield shape_case(device, "entries beyond 16384", extra, ragged=ragged, extra=extra)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield shape_case(device, "dtype", str(dtype).removeprefix("torch."), ragged=ragged, dtype=dtype)
        for dim in (64, 80, 96, 112, 192, 256):
            for group in (1, 7, 8, 16):
                yield shape_case(device, "head_dim x q_per_kv", f"{dim} x {group}", ragged=ragged, dim=dim, group=group)


def shape_case(
    device, swept, value, *, ragged, dim=DIM, group=4, queries=1, heads=KV_HEADS, extra=0, dtype=torch.bfloat16
) -> Case:
    length = 2**26 // (2 * heads * dim * dtype.itemsize) + extra
    size = 2 * heads * length * dim * dtype.itemsize

    def make():
        q = torch.randn(1, heads * group, queries, dim, device=device).to(dtype)
        shape = (heads * length, dim) if ragged else (1, heads, length, dim)
        k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        return q, k, v, torch.arange(heads, device=device) * length, torch.full((heads,), length, device=device).int()

    return Case(
        op="ragged_decode_attention" if ragged else "decode_attention",
        label=f"{swept} {value}",
        make=make,
        variants={
            "kvcompress": (lambda x: kvcompress.ragged_decode_attention(*x, max_length=length))
            if ragged
            else (lambda x: kvcompress.decode_attention(*x[:3]))
        },
        passes=[Work(read=size, flop=4.0 * heads * group * queries * length * dim,
                     exponentials=heads * group * queries * length)],
        footprint=size,
        params={"swept": swept, "value": value, "heads": heads, "q_per_kv": group, "queries": queries,
                "head_dim": dim, "entries": length, "dtype": str(dtype).removeprefix("torch.")},
    )  # fmt: skip
