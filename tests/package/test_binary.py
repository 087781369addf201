"""What the compiled files may contain and ask for: one binary must load on every torch from 2.11 on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcompress import _library

OPS = _library.find()
FILES = sorted({*OPS.parent.glob("*.so")})
SYSTEM_VERSIONS = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")
LINKER_NAMES = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
SYSTEM_LIBRARIES = {"libc", "libm", "libdl", "librt", "libpthread", "libgcc_s", "libstdc++", "ld-linux-x86-64"}


def undefined() -> list[tuple[str, str, str]]:
    """(kind, name, version) of every symbol that the ops library leaves to others."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", OPS], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return [(kind, *symbol.partition("@")[::2]) for kind, symbol in rows]


def dynamic(tag: str) -> list[str]:
    listing = subprocess.run(["readelf", "-dW", OPS], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"\({tag}\).*\[(.*)\]", listing)


def test_schemas_have_no_str():
    """A str argument leaks in every torch up to 2.13."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("kvcompress::")]
    assert schemas
    assert [s.name for s in schemas for a in [*s.arguments, *s.returns] if "str" in str(a.type).lower()] == []


def test_symbols_are_the_stable_abi_and_the_system():
    foreign = [
        name
        for _, name, version in undefined()
        if not version.lstrip("@").startswith(SYSTEM_VERSIONS)
        and not name.startswith(("aoti_torch_", "torch_"))
        and name not in LINKER_NAMES
    ]
    assert foreign == []


def test_the_stream_is_the_only_weak_symbol():
    """Present in a CUDA build of torch, absent in a CPU build: all else must be there or the load must fail."""
    weak = {name for kind, name, version in undefined() if kind in "wv" and not version}
    assert weak - LINKER_NAMES <= {"aoti_torch_get_current_cuda_stream"}


def test_needed_libraries():
    names = {re.split(r"\.so", name)[0] for name in dynamic("NEEDED")}
    assert {"libtorch", "libtorch_cpu"} <= names, "libtorch brings libtorch_cuda in, where there is one"
    assert names <= SYSTEM_LIBRARIES | {"libtorch", "libtorch_cpu"}
    assert dynamic("RPATH") + dynamic("RUNPATH") == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name.split(".")[0])
def test_no_path_of_the_build_machine(file):
    text = file.read_bytes()
    source_file = rb"(?<![\w.+-])/(?:[\w.+-]+/)+[\w.+-]+\.(?:h|hpp|cuh|inl|c|cc|cpp|cu)\b"
    assert re.findall(source_file, text) == []
    for folder in (Path(torch.__file__).parent, sys.prefix, Path(__file__).parents[2]):
        assert str(folder).encode() not in text
