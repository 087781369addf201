"""KVCOMPRESS_SM=80: the forms for cards before Hopper, on whatever GPU is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ROOMS = ["score", "select", "store", "attend", "budget"]
WATCHED = """
import torch, kvcompress
q, k = torch.randn(1, 8, 32, 128, device="cuda").half(), torch.randn(1, 2, 4096, 128, device="cuda").half()
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watch:
    kvcompress.topk(kvcompress.window_scores(q, k), 1024)
    torch.cuda.synchronize()
print([event.name for event in watch.events()])
"""


def run(*command: str, sm: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "KVCOMPRESS_SM"}
    environment |= {"KVCOMPRESS_REQUIRE_CUDA": "1", **({"KVCOMPRESS_SM": sm} if sm else {})}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.cuda
@pytest.mark.slow
def test_ops_are_right_there_too():
    done = run("-m", "pytest", "-q", "-m", "cuda", "-k", "not 64_bit and not long", "-p", "no:cacheprovider",
               "--sample", "2", *(f"tests/{room}" for room in ROOMS), sm="80")  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


@pytest.mark.cuda
def test_the_forms_differ():
    own, older = run("-c", WATCHED, sm=None), run("-c", WATCHED, sm="80")
    assert own.returncode == 0, own.stderr
    assert older.returncode == 0, older.stderr
    assert ("sm90a" in own.stdout) == (torch.cuda.get_device_capability()[0] == 9)
    assert "kvc::" in older.stdout
    assert "sm90a" not in older.stdout


@pytest.mark.cuda
def test_only_80():
    done = run("-c", WATCHED, sm="70")
    assert done.returncode != 0
    assert "KVCOMPRESS_SM must be 80, or not set, got 70" in done.stderr
