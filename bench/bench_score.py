"""Score ops, on a Llama-3.1-8B layer in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvcompress
from bench import peers
from bench.harness import Case, Work
from tests.cases import HEAD_DIMS, LAYER, POOLS, WINDOWS, prompts

EAGER_KEYS = 2**18  # eager torch and kvpress write the map: GiBs beyond that
COMPILED = {(1, 8192, 64), (1, 32768, 64), (1, 131072, 64), (8, 32768, 64)}  # (batch, seq_len, window); slow to compile


def passes(batch: int, heads: int, rows: int, dim: int, length: int, item: int, *, lse: bool) -> list[Work]:
    """K read once and all products and exponentials; without the log-sum-exp once more, then from the cache.

    On a CPU one pass is enough either way: its caches hold the exponentials of a few heads.
    """
    keys = batch * heads * length * dim * item
    work = {
        "read": keys,
        "flop": 2.0 * batch * heads * rows * dim * length,
        "exponentials": batch * heads * rows * length,
    }
    return [Work(**work)] if lse else [Work(**work), Work(**{**work, "read": 0.0})]


def gemm_alone(x, window: int, group: int):
    """The products alone, by the best library of this machine: q of a kv head's group times all keys."""
    q, k = x[0], x[1]
    return q.view(k.shape[0], k.shape[1], group * window, -1) @ k.transpose(2, 3)


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    kvpress = peers.kvpress_snapkv()
    compiled = peers.compiled_window_scores() if device.type == "cuda" and not quick else None
    for batch, length in prompts(device, quick=quick):
        for window in WINDOWS:
            for pool, kernel in POOLS:
                yield from prompt_cases(device, batch, length, window, pool, kernel, kvpress, compiled)
    yield from column_cases(device, quick=quick)
    if device.type == "cpu":
        yield from float32_cases(device)


def inputs(device, batch, length, window, dtype=torch.bfloat16, layer=LAYER):
    q = torch.randn(batch, layer.num_q_heads, window, layer.head_dim, device=device).to(dtype)
    k = torch.randn(batch, layer.num_kv_heads, length, layer.head_dim, device=device, dtype=dtype)
    return q, k, torch.full((batch, layer.num_q_heads, window), 10.0, device=device)


def prompt_cases(device, batch, length, window, pool, kernel, kvpress, compiled) -> Iterator[Case]:
    options = {"pool": pool, "kernel_size": kernel}
    keys = batch * LAYER.num_kv_heads * length * LAYER.head_dim * 2
    params = {"batch": batch, "seq_len": length, "window": window, **options, "dtype": "bfloat16"}
    shape = (batch, LAYER.num_kv_heads, window * LAYER.q_per_kv, LAYER.head_dim, length, 2)
    variants = {"kvcompress": lambda x: kvcompress.window_scores(x[0], x[1], **options)}
    absent = {}
    if pool == "max":
        absent = dict.fromkeys(("torch", "kvpress"), "beside avg: the pool is under 1 % of their time")
    elif batch * length <= EAGER_KEYS:
        variants["torch"] = lambda x: peers.torch_window_scores(x[0], x[1], pool, kernel)
        if isinstance(kvpress, str):
            absent["kvpress"] = kvpress
        else:
            variants["kvpress"] = lambda x: kvpress[0](x[0], x[1], kernel)
    else:
        absent |= dict.fromkeys(("torch", "kvpress"), "writes the map: tens of GiB at this size")
    if compiled is not None and (batch, length, window) in COMPILED and pool == "avg":
        variants["torch.compile"] = lambda x: compiled(x[0], x[1], pool, kernel)
    if device.type == "cpu" and pool == "avg":
        variants["torch, product alone"] = lambda x: gemm_alone(x, window, LAYER.q_per_kv)
    for lse in (False, True):
        ours = {"kvcompress": lambda x: kvcompress.window_scores(x[0], x[1], lse=x[2], **options)} if lse else variants
        yield Case(
            op="window_scores, lse given" if lse else "window_scores",
            label=f"B{batch} S{length} W{window} {pool}{kernel}",
            make=lambda: inputs(device, batch, length, window),
            variants=ours,
            passes=passes(*shape, lse=lse or device.type == "cpu"),
            footprint=keys,
            graph=True,
            core=True,
            absent={} if lse else absent,
            notes="one pass" if lse or device.type == "cpu" else "two passes, the second from L2",
            params=params,
        )


def float32_cases(device) -> Iterator[Case]:
    length = 8192
    for window in WINDOWS:
        yield Case(
            op="window_scores",
            label=f"B1 S{length} W{window} avg5 float32",
            make=lambda window=window: inputs(device, 1, length, window, torch.float32),
            variants={
                "kvcompress": lambda x: kvcompress.window_scores(x[0], x[1], pool="avg", kernel_size=5),
                "torch": lambda x: peers.torch_window_scores(x[0], x[1], "avg", 5),
                "torch, product alone": lambda x, window=window: gemm_alone(x, window, LAYER.q_per_kv),
            },
            passes=passes(1, LAYER.num_kv_heads, window * LAYER.q_per_kv, LAYER.head_dim, length, 4, lse=True),
            footprint=LAYER.num_kv_heads * length * LAYER.head_dim * 4,
            core=True,
            params={"batch": 1, "seq_len": length, "window": window, "dtype": "float32"},
        )


def sweep(device: torch.device) -> Iterator[Case]:
    """64 MiB of keys each time, whatever their shape."""
    for lse in (False, True):
        for dim in HEAD_DIMS:
            yield shape_case(device, "head_dim", dim, lse=lse, dim=dim)
        for group in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16):
            yield shape_case(device, "q_per_kv", group, lse=lse, group=group)
        for window in (1, 2, 4, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128):
            yield shape_case(device, "window", window, lse=lse, window=window)
        for heads in (1, 2, 3, 5, 7, 8, 16, 31, 64, 128):
            yield shape_case(device, "kv heads", heads, lse=lse, heads=heads)
        for extra in (-63, -1, 1, 3, 127):
            yield shape_case(device, "entries beyond 32768", extra, lse=lse, extra=extra)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield shape_case(device, "dtype", str(dtype).removeprefix("torch."), lse=lse, dtype=dtype)
        for dim in (64, 80, 96, 112, 192, 256):
            for group in (1, 7, 8, 16):
                yield shape_case(device, "head_dim x q_per_kv", f"{dim} x {group}", lse=lse, dim=dim, group=group)


def shape_case(
    device, swept, value, *, lse, dim=128, group=4, window=32, heads=8, extra=0, dtype=torch.bfloat16
) -> Case:
    item = dtype.itemsize
    length = 2**26 // (heads * dim * item) + extra

    def make():
        q = torch.randn(1, heads * group, window, dim, device=device).to(dtype)
        k = torch.randn(1, heads, length, dim, device=device, dtype=dtype)
        return q, k, torch.full((1, heads * group, window), 10.0, device=device) if lse else None

    return Case(
        op="window_scores, lse given" if lse else "window_scores",
        label=f"{swept} {value}",
        make=make,
        variants={"kvcompress": lambda x: kvcompress.window_scores(x[0], x[1], lse=x[2], pool="avg", kernel_size=5)},
        passes=passes(1, heads, window * group, dim, length, item, lse=lse),
        footprint=heads * length * dim * item,
        params={"swept": swept, "value": value, "heads": heads, "q_per_kv": group, "head_dim": dim,
                "seq_len": length, "window": window, "dtype": str(dtype).removeprefix("torch.")},
    )  # fmt: skip


def column_cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """All queries of the prompt: column sums beside torch's flash attention, which has two products where these have one."""
    cuda = device.type == "cuda"
    for length in (8192, 32768) if cuda and not quick else (8192 if cuda else 2048,):
        pairs = LAYER.num_q_heads * length * (length + 1) / 2  # of a query and a key that it sees
        rows = {"flop": 2.0 * pairs * LAYER.head_dim, "exponentials": pairs}
        read = (LAYER.num_q_heads + LAYER.num_kv_heads) * length * LAYER.head_dim * 2

        def make(length: int = length):
            q, k, _ = inputs(device, 1, length, length)
            v = torch.randn_like(k)
            output, lse = peers.flash_attention(q, k, v)
            return q, k, lse, v, output

        peer = {"torch SDPA flash": lambda x: peers.sdpa_flash(x[0], x[1], x[3])} if cuda else {}
        compiled = {"torch.compile": peers.compiled_column_sums()} if cuda and not quick and length <= 8192 else {}
        absent = {} if compiled else {"torch.compile": "writes the map: at 32k 137 GiB in float32"}
        for op, given, work in (
            ("column_sums, lse given", True, [Work(read=read, **rows)]),
            ("column_sums", False, [Work(read=read, **rows), Work(**rows)]),
        ):
            yield Case(
                op=op,
                label=f"B1 S{length} all queries",
                make=make,
                variants={
                    "kvcompress": lambda x, given=given: kvcompress.column_sums(
                        x[0], x[1], lse=x[2] if given else None
                    ),
                    **peer,
                    **({} if given else compiled),
                },
                passes=work,
                footprint=read,
                tests=("column_sums",),
                absent={} if given else absent,
                notes="one pass over the causal half" if given else "two passes over the causal half",
                params={"batch": 1, "seq_len": length, "window": length, "dtype": "bfloat16"},
            )
        yield Case(
            op="column_sums, joint_change",
            label=f"B1 S{length} all queries",
            make=make,
            variants={
                "kvcompress": lambda x: kvcompress.column_sums(
                    x[0], x[1], statistic="joint_change", group_reduce="sum", lse=x[2], v=x[3], output=x[4]
                ),
                **peer,
            },
            passes=[Work(read=2 * read, flop=2 * rows["flop"], exponentials=pairs)],
            footprint=2 * read,
            tests=("column_sums",),
            notes="log-sum-exp given, two products",
            params={"batch": 1, "seq_len": length, "window": length, "dtype": "bfloat16"},
        )
