"""`import kvcompress` loads the ops and does nothing else."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import os, sys
import torch
before = (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads())
modules = set(sys.modules)
import kvcompress
assert before == (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads())
assert not torch.cuda.is_initialized()
new = {name.partition(".")[0] for name in set(sys.modules) - modules}
print(sorted(new & {"transformers", "typer", "rich", "matplotlib", "safetensors", "pytest", "hypothesis"}))
print("kvcompress._C" in sys.modules, kvcompress._C.build["version"] == kvcompress.__version__)
"""


def test_import_changes_nothing():
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["[]", "False True"]
    assert run.stderr == ""


def test_public_names_exist():
    import kvcompress

    assert sorted(kvcompress.__all__, key=str.lower) == sorted(set(kvcompress.__all__), key=str.lower)
    assert [name for name in kvcompress.__all__ if not hasattr(kvcompress, name)] == []
