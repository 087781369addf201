"""Loads the compiled ops once and tells what was loaded."""

from __future__ import annotations

from pathlib import Path

import torch

_FILE_NAME = "libkvcompress.so"


def find() -> Path | None:
    """The compiled ops, looked for over the package's search path (editable installs have two folders)."""
    import kvcompress

    for folder in kvcompress.__path__:
        candidate = Path(folder) / _FILE_NAME
        if candidate.is_file():
            return candidate
    return None


def load() -> None:
    """Loads the ops, unless this process has them already: a second copy of the library would crash it."""
    if hasattr(torch.ops.kvcompress, "build_id"):
        return
    path = find()
    if path is None:
        raise ImportError(
            f"kvcompress: {_FILE_NAME} is not beside the Python files; "
            "build it with `pip install --no-build-isolation .` in the source tree"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"kvcompress: {path} does not load into torch {torch.__version__}, which must be 2.11 or newer: {error}"
        ) from error
