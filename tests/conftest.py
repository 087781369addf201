"""What every test stands on: seeds, poisoned buffers, the device axis and the golden folder."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

import kvcompress  # noqa: F401  (loads the ops)


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).parent / "golden"
    parser.addoption("--golden-dir", type=Path, default=default, help="folder <method>/*.safetensors to replay")
    parser.addoption(
        "--sample",
        type=int,
        help="run at most this many parametrisations of a test, evenly spread, and few fuzz examples",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sample"):
        hypothesis.settings.register_profile("sample", max_examples=config.getoption("--sample"), deadline=None)
        hypothesis.settings.load_profile("sample")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        devices = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
        metafunc.parametrize("device", devices)


def _sample(items: list[pytest.Item], most: int) -> list[pytest.Item]:
    """At most `most` items of every test function and device, evenly spread over its parameters."""
    groups: dict[tuple[str, bool], list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid.partition("[")[0]
        groups.setdefault((name, item.get_closest_marker("cuda") is not None), []).append(item)
    return [own[i * len(own) // min(most, len(own))] for own in groups.values() for i in range(min(most, len(own)))]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--sample"):
        items[:] = _sample(items, config.getoption("--sample"))
    if torch.cuda.is_available() or os.environ.get("KVCOMPRESS_REQUIRE_CUDA"):
        return  # with the variable set, a machine without a GPU fails instead of skipping
    skip = pytest.mark.skip(reason="no GPU; KVCOMPRESS_REQUIRE_CUDA=1 makes this a failure")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(request):
    """Same inputs every run; fresh torch buffers hold NaN or INT_MAX, so that an unwritten output shows.

    Not under `--sample`: initcheck finds what was never written by itself, and a fill would hide it.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = not request.config.getoption("--sample")
    yield
    torch.use_deterministic_algorithms(False)
