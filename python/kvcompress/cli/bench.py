"""`kvcompress bench`: the repository's benchmark, also from an installed wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

import kvcompress
from kvcompress.cli.console import fail

__all__ = ["bench", "script"]


def script() -> Path | None:
    """bench/run.py of the source tree that the package lies in, else the copy that the wheel carries."""
    folders = [Path(folder) for folder in kvcompress.__path__]
    candidates = [folder.parents[1] / "bench" / "run.py" for folder in folders]
    candidates += [folder / "_bench" / "bench" / "run.py" for folder in folders]
    return next((path for path in candidates if path.is_file()), None)


def bench(context: typer.Context) -> None:
    """Time ops and methods against torch, other libraries and this machine's floor.

    Everything behind `bench` goes to bench/run.py; `kvcompress bench --help` shows its options. A wheel carries that
    program and the tests of the ops, so it measures the same cases and refuses as well where a test fails; the tests of
    methods stay in the repository: there `--method` needs `--untested`.
    """
    path = script()
    if path is None:
        fail(
            "neither a source tree nor a wheel's copy of bench/run.py was found",
            "install the wheel, or run from a clone",
        )
    raise typer.Exit(subprocess.run([sys.executable, str(path), *context.args]).returncode)
