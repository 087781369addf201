"""Score ops, on a Llama-3.1-8B layer: 32 query heads, 8 kv heads, head_dim 128, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import kvcompress
from bench.harness import Case

Q_HEADS, KV_HEADS, DIM = 32, 8, 128


def torch_scores(q: torch.Tensor, k: torch.Tensor, pool: str, kernel: int) -> torch.Tensor:
    """The same numbers in eager torch without repeating K: materialises [B, Hkv, G * W, S]."""
    batch, heads, window, dim = q.shape
    length = k.shape[2]
    group = heads // k.shape[1]
    logits = q.reshape(batch, k.shape[1], group * window, dim) @ k.transpose(2, 3) * dim**-0.5
    rows = torch.arange(window, device=q.device).repeat(group)
    hidden = torch.arange(length, device=q.device) > length - window + rows[:, None]
    votes = logits.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    votes = votes.view(batch, k.shape[1], group, window, length).sum(3).mean(2)[..., : length - window]
    if pool == "avg":
        return F.avg_pool1d(votes, kernel, 1, kernel // 2)
    return F.max_pool1d(votes, kernel, 1, kernel // 2)


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    shapes = [(1, 8192), (1, 32768), (1, 131072), (8, 32768)]
    if quick or device.type == "cpu":
        shapes = [(1, 8192)]
    compiled = torch.compile(torch_scores) if device.type == "cuda" and not quick else None
    for batch, length in shapes:
        for window in (32, 64):
            for pool, kernel in (("avg", 5), ("max", 7)):
                if pool == "max" and (batch, length) != shapes[0]:
                    continue  # under 1 % from avg everywhere it was measured
                key_bytes = batch * KV_HEADS * length * DIM * 2
                rows = window * Q_HEADS // KV_HEADS

                def make(batch: int = batch, length: int = length, window: int = window):
                    q = torch.randn(batch, Q_HEADS, window, DIM, device=device, dtype=torch.bfloat16)
                    k = torch.randn(batch, KV_HEADS, length, DIM, device=device, dtype=torch.bfloat16)
                    lse = torch.full((batch, Q_HEADS, window), 10.0, device=device)
                    return q, k, lse

                options = {"pool": pool, "kernel_size": kernel}
                variants = {"kvcompress": lambda x, o=options: kvcompress.window_scores(x[0], x[1], **o)}
                if batch * length <= 2**18:  # eager materialises the map
                    variants["torch eager"] = lambda x, p=pool, n=kernel: torch_scores(x[0], x[1], p, n)
                if compiled is not None and batch * length <= 2**18:
                    variants["torch.compile"] = lambda x, p=pool, n=kernel: compiled(x[0], x[1], p, n)
                common = {
                    "batch": batch,
                    "seq_len": length,
                    "window": window,
                    "pool": pool,
                    "kernel_size": kernel,
                    "num_q_heads": Q_HEADS,
                    "num_kv_heads": KV_HEADS,
                    "head_dim": DIM,
                    "dtype": "bfloat16",
                }
                flop = 2 * rows * DIM * batch * KV_HEADS * length
                exponentials = rows * batch * KV_HEADS * length
                # two passes: the second reads from L2 at best, computes all again
                yield Case(
                    "window_scores",
                    f"B{batch} S{length} W{window} {pool}{kernel}",
                    make,
                    variants,
                    read=key_bytes,
                    flop=2 * flop,
                    exponentials=2 * exponentials,
                    footprint=key_bytes,
                    params=common,
                    notes="floor of two passes: matmul and exponentials twice, K read once",
                )
                yield Case(
                    "window_scores, lse given",
                    f"B{batch} S{length} W{window} {pool}{kernel}",
                    make,
                    {"kvcompress": lambda x, o=options: kvcompress.window_scores(x[0], x[1], lse=x[2], **o)},
                    read=key_bytes,
                    flop=flop,
                    exponentials=exponentials,
                    footprint=key_bytes,
                    params=common,
                    notes="floor of one pass",
                )
