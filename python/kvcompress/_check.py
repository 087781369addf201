"""The Python half of the argument checks: the words of csrc/common/check.h, for the fakes and the front doors.

A wrong call fails with the same sentence from CPU, CUDA and fake: "op: argument must be <what>, got <what came>".
`tests/bad_inputs.py` holds every op to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

_SENTENCE = re.compile(r"\w+: \w+ must be .+, got .+")
_DTYPES = re.compile(r"got (float|bfloat|int|uint|bool|complex)\d*$|got an unsupported dtype$")


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an op; a failed check becomes a TypeError (dtypes) or a ValueError (all else), with the same words."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        sentence = _SENTENCE.search(str(error))
        if sentence is None:
            raise
        words = sentence.group(0)
        kind = TypeError if _DTYPES.search(words) else ValueError
        raise kind(words) from None


def fail(op: str, argument: str, must: str, got: object) -> NoReturn:
    raise RuntimeError(f"{op}: {argument} must be {must}, got {got}")


def require(ok: bool | torch.SymBool, op: str, argument: str, must: str, got: object) -> None:
    if not ok:
        fail(op, argument, must, got)


def shape_string(t: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in t.shape) + "]"


def dtype_string(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rank(op: str, argument: str, t: Tensor, dims: int, layout: str) -> None:
    require(t.dim() == dims, op, argument, layout, f"{t.dim()}D {shape_string(t)}")


def dtype(op: str, argument: str, t: Tensor, wanted: torch.dtype) -> None:
    require(t.dtype == wanted, op, argument, dtype_string(wanted), dtype_string(t.dtype))


def float_dtype(op: str, argument: str, t: Tensor) -> None:
    ok = t.dtype in (torch.float32, torch.float16, torch.bfloat16)
    require(ok, op, argument, "float32, float16 or bfloat16", dtype_string(t.dtype))


def same_dtype(op: str, argument: str, t: Tensor, anchor: Tensor, anchor_name: str) -> None:
    must = f"of the dtype of {anchor_name} ({dtype_string(anchor.dtype)})"
    require(t.dtype == anchor.dtype, op, argument, must, dtype_string(t.dtype))


def same_device(op: str, argument: str, t: Tensor, anchor: Tensor, anchor_name: str) -> None:
    must = f"on the device of {anchor_name} ({anchor.device})"
    require(t.device == anchor.device, op, argument, must, t.device)


def last_contiguous(op: str, argument: str, t: Tensor) -> None:
    ok = t.shape[-1] <= 1 or t.stride(-1) == 1
    got = f"a last stride of {t.stride(-1)}"
    require(ok, op, argument, "contiguous in the last dimension", got)


def row_vector(op: str, argument: str, t: Tensor | None, batch: int, anchor: Tensor, anchor_name: str) -> None:
    """The whole check of a small int32 vector [batch]: seq_start, counts and their like."""
    if t is None:
        return
    ok = t.dim() == 1 and t.shape[0] == batch
    require(ok, op, argument, f"[batch] ({batch})", f"{t.dim()}D {shape_string(t)}")
    dtype(op, argument, t, torch.int32)
    same_device(op, argument, t, anchor, anchor_name)
    last_contiguous(op, argument, t)


def code(op: str, argument: str, codes: dict[str, int], name: str) -> int:
    """The code of a name that a Python function takes; ValueError where there is none."""
    if name not in codes:
        *most, last = (f'"{known}"' for known in codes)
        raise ValueError(f"{op}: {argument} must be {', '.join(most)} or {last}, got {name!r}")
    return codes[name]


def companion(op: str, argument: str, t: Tensor | None, layout: str, shape: tuple[int, ...], q: Tensor) -> None:
    """The whole check of an optional float32 companion of q or k."""
    if t is None:
        return
    ok = t.dim() == len(shape) and all(size == wanted for size, wanted in zip(t.shape, shape))
    must = f"{layout} [{', '.join(str(size) for size in shape)}]"
    require(ok, op, argument, must, f"{t.dim()}D {shape_string(t)}")
    dtype(op, argument, t, torch.float32)
    same_device(op, argument, t, q, "q")
    last_contiguous(op, argument, t)


def attention_rows(
    op: str, q: Tensor, k: Tensor, lse: Tensor | None, seq_start: Tensor | None, first_query: int, softmax_scale: float
) -> None:
    """The checks of csrc/score/attention_rows_check.cpp: queries, keys and what goes with them."""
    rank(op, "q", q, 4, "[batch, num_q_heads, window, head_dim]")
    rank(op, "k", k, 4, "[batch, num_kv_heads, seq_len, head_dim]")
    float_dtype(op, "q", q)
    same_dtype(op, "k", k, q, "q")
    same_device(op, "k", k, q, "q")
    batch, num_q_heads, window, head_dim = q.shape
    num_kv_heads = k.shape[1]
    require(k.shape[0] == batch, op, "k", f"of the batch of q ({batch})", k.shape[0])
    require(k.shape[3] == head_dim, op, "k", f"of the head_dim of q ({head_dim})", k.shape[3])
    ok = 8 <= head_dim <= 256 and head_dim % 8 == 0
    require(ok, op, "head_dim", "a multiple of 8 from 8 to 256", head_dim)
    require(num_kv_heads >= 1, op, "num_kv_heads", "at least 1", num_kv_heads)
    ok = num_q_heads >= 1 and num_q_heads % num_kv_heads == 0
    require(ok, op, "num_q_heads", f"a multiple of num_kv_heads ({num_kv_heads})", num_q_heads)
    require(window >= 1, op, "window", "at least 1", window)
    last_contiguous(op, "q", q)
    last_contiguous(op, "k", k)
    companion(op, "lse", lse, "[batch, num_q_heads, window]", (batch, num_q_heads, window), q)
    row_vector(op, "seq_start", seq_start, batch, q, "q")
    require(first_query >= 0, op, "first_query", "at least 0", first_query)
    ok = 0 < softmax_scale < float("inf")
    require(ok, op, "softmax_scale", "finite and above 0", f"{softmax_scale:f}")
