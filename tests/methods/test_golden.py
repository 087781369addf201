"""Replays the official outputs: <golden-dir>/<method>/*.safetensors through tests/methods/replay/<method>.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.methods.golden import Golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--golden-dir")
    paths = sorted(folder.glob("*/*.safetensors"))
    assert paths, f"no golden cases in {folder}"
    metafunc.parametrize("path", paths, ids=[f"{path.parent.name}-{path.stem}" for path in paths])


def test_golden(path: Path) -> None:
    case = Golden(path)
    module = importlib.import_module(f"tests.methods.replay.{case.method}")  # an unknown method fails here
    module.replay(case)
    case.assert_all_taken()
