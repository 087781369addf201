"""Memory in use stays flat over many calls of every op."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

from tests.test_every_op import MODULES, OPS, packet

CALLS = 1000


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


_libc = ctypes.CDLL(None)
_libc.mallinfo2.restype = _Mallinfo2
_libc.malloc.restype = ctypes.c_void_p
_libc.free.argtypes = [ctypes.c_void_p]


def in_use() -> int:
    """Bytes that this thread's C heap has handed out: exact, where resident memory hides a small leak for long."""
    gc.collect()
    info = _libc.mallinfo2()
    return info.uordblks + info.hblkhd


def growth(call, calls: int = CALLS) -> float:
    """Bytes a call leaves behind."""
    for _ in range(calls // 4):
        call()
    before = in_use()
    for _ in range(calls):
        call()
    return (in_use() - before) / calls


@pytest.mark.parametrize("op", OPS)
def test_samples_set_every_optional_argument(op):
    arguments = packet(op)._schema.arguments
    samples = MODULES[op].samples("cpu")
    for place, argument in enumerate(arguments):
        if isinstance(argument.type, torch.OptionalType):
            assert any(args[place] is not None for args in samples), f"{op}: no sample sets {argument.name}"


@pytest.mark.parametrize("op", OPS)
def test_flat(op):
    for args in MODULES[op].samples("cpu"):
        assert growth(lambda args=args: packet(op)(*args)) < 8, op


def test_a_leak_would_show():
    held = []
    assert growth(lambda: held.append(_libc.malloc(48))) >= 48
    for pointer in held:
        _libc.free(pointer)
