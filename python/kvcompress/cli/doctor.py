"""`kvcompress doctor`: what is installed, what was built, what is missing, and what to do about it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import kvcompress
from kvcompress import _library
from kvcompress.cli.console import print_json, results

__all__ = ["covers", "doctor", "examine"]

_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[bold red]broken[/]"}


@dataclass(frozen=True)
class _Extra:
    """A package that some commands need: versions in [least, below)."""

    module: str
    extra: str
    use: str
    least: tuple[int, int]
    below: tuple[int, int] = (10**6, 0)


_EXTRAS = (
    _Extra("transformers", "hf", "`generate`, `demo` and kvcompress.models", (5, 17), (6, 0)),
    _Extra("safetensors", "hf", "saving and loading a compressed cache", (0, 5)),
    _Extra("matplotlib", "plots", "`demo --plot`", (3, 8)),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; `do` is empty where nothing is to be done."""

    what: str
    state: str  # a key of _MARKS
    found: str
    do: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what is installed and built, what is missing, and what to do. Exit code 1 if something needed is broken."""
    findings = list(examine())
    broken = any(finding.state == "broken" for finding in findings)
    if as_json:
        print_json({"ok": not broken, "findings": [asdict(finding) for finding in findings]})
    else:
        table = Table(title="kvcompress doctor", title_justify="left")
        for heading in ("", "what", "found", "what to do"):
            table.add_column(heading, overflow="fold")
        for finding in findings:
            table.add_row(_MARKS[finding.state], finding.what, finding.found, finding.do)
        results().print(table)
    raise typer.Exit(1 if broken else 0)


def examine() -> Iterator[Finding]:
    """All findings, in the order of the report."""
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield _torch()
    yield Finding("ops library", "ok", str(_library.find() or "loaded from elsewhere"))
    yield _first_call()
    build = _build()
    yield _module(build)
    yield from _gpu(build)
    for extra in _EXTRAS:
        yield _extra(extra)


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for CMake's `architectures` (also with commas) has code for a GPU: its own kind's binary, or PTX of an older one."""
    major, minor = capability
    for entry in re.split("[;,]", architectures):
        parsed = re.fullmatch(r"(\d+)(\d)[af]?(-real|-virtual)?", entry)
        if parsed is None:
            continue
        of, kind = (int(parsed[1]), int(parsed[2])), parsed[3]
        binary = kind != "-virtual" and of[0] == major and of[1] <= minor
        ptx = kind != "-real" and of <= capability
        if binary or ptx:
            return True
    return False


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _extra(extra: _Extra) -> Finding:
    do = f"pip install 'kvcompress[{extra.extra}]'"
    if find_spec(extra.module) is None:
        return Finding(extra.module, "note", f"not installed; needed for {extra.use}", do)
    version = importlib.metadata.version(extra.module)
    if not extra.least <= _release(version) < extra.below:
        return Finding(extra.module, "note", f"{version} does not fit; needed for {extra.use}", do)
    return Finding(extra.module, "ok", version)


def _torch() -> Finding:
    found = f"{torch.__version__} (CUDA {torch.version.cuda or 'none: CPU build'})"
    if _release(torch.__version__) < (2, 11):
        return Finding("torch", "broken", found, "install torch 2.11 or newer")
    return Finding("torch", "ok", found)


def _first_call() -> Finding:
    row = torch.ones(1, 1, 8)
    try:
        worked = abs(kvcompress.cosine_importance(row, row).item() - 1) < 1e-6
    except RuntimeError as error:
        return Finding("first op on the CPU", "broken", str(error), "rebuild: `pip install --no-build-isolation .`")
    return Finding("first op on the CPU", "ok" if worked else "broken", "works" if worked else "wrong result")


def _build() -> dict[str, str]:
    try:
        return dict(importlib.import_module("kvcompress._C").build)
    except ImportError:
        return {}


def _module(build: dict[str, str]) -> Finding:
    if not build:
        do = "for host planners and build facts: `pip install --no-build-isolation .` with this Python"
        return Finding("kvcompress._C", "note", "missing for this Python", do)
    cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "no CUDA kernels"
    return Finding("built", "ok", f"{build['version']} with {cuda}, {build['compiler']}, {build['build_type']}")


def _gpu(build: dict[str, str]) -> Iterator[Finding]:
    driver = _driver()
    if driver is None:
        yield Finding("GPU driver", "note", "none", "nothing, unless this machine has a GPU: then install its driver")
        return
    yield Finding("GPU driver", "ok", f"for CUDA up to {driver}")
    if not torch.cuda.is_available():
        do = "install a CUDA build of torch that fits the driver"
        yield Finding("GPU", "note", "a driver, but torch sees no GPU", do if torch.version.cuda is None else "")
        return
    for index in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        name = f"{properties.name}, sm_{properties.major}{properties.minor}"
        rebuild = f"-C cmake.define.CMAKE_CUDA_ARCHITECTURES={properties.major}{properties.minor}-real"
        do = f"install the CUDA toolkit, then `pip install --no-build-isolation {rebuild} .`"
        if not build:
            yield Finding(f"GPU {index}", "note", f"{name}; unknown whether the library has code for it", do)
        elif not covers(build["cuda_architectures"], capability):
            yield Finding(f"GPU {index}", "broken", f"{name}; the library has no code for it", do)
        else:
            yield Finding(f"GPU {index}", "ok", name)


def _driver() -> str | None:
    """The newest CUDA that the driver runs, or None without a driver. Creates no CUDA context."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except OSError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
