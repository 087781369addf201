"""What every test stands on: seeds, poisoned buffers, the device axis and the golden folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import kvcompress  # noqa: F401  (loads the ops)


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).parent / "golden"
    parser.addoption("--golden-dir", type=Path, default=default, help="folder <method>/*.safetensors to replay")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        devices = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
        metafunc.parametrize("device", devices)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("KVCOMPRESS_REQUIRE_CUDA"):
        return  # with the variable set, a machine without a GPU fails instead of skipping
    skip = pytest.mark.skip(reason="no GPU; KVCOMPRESS_REQUIRE_CUDA=1 makes this a failure")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Same inputs every run; fresh torch buffers hold NaN or INT_MAX, so that an unwritten output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
