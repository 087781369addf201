"""Runs commands as a person would, and reads what they print."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from kvcompress.cli.app import app


@pytest.fixture
def run(monkeypatch):
    """`run("methods", "--json")` -> result with exit_code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "500")  # no line of a table breaks
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words])


@pytest.fixture
def refused(run):
    """A wrong call ends with 2, an error in one line, and another that says what to do."""

    def call(*words: object) -> str:
        result = run(*words)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        error, do = result.stderr.strip().splitlines()
        assert error.startswith("error: ")
        assert do.startswith("  ")
        return result.stderr

    return call
