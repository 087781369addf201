"""The front door."""

from __future__ import annotations

import subprocess
import sys

import kvcompress


def test_help_teaches(run):
    text = run("--help").stdout
    for words in ("kvcompress demo", "kvcompress generate --model", "kvcompress doctor"):
        assert words in text


def test_version(run):
    assert run("--version").stdout.strip() == kvcompress.__version__


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "kvcompress", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == kvcompress.__version__


def test_without_typer():
    """Users of the library need no command line; who calls it learns what to install."""
    probe = "import sys; sys.modules['typer'] = None; from kvcompress.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "kvcompress: the command line needs typer; install it with `pip install 'kvcompress[hf]'`"
    )
