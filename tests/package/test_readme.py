"""The README and the examples say what is true: the methods are the registry's, the code runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from bench import report
from kvcompress.cli.methods import markdown

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_methods_table_is_the_registry():
    table = re.search(r"<!-- methods: (.*?) -->\n(.*?)\n?<!-- /methods -->", README, re.DOTALL)
    assert table[2] == markdown(), f"`make readme` writes the output of `{table[1]}` between the marks"


def test_measured_tables_are_the_files():
    assert report.filled(README, ROOT) == README, "`make readme` writes the tables from bench/results"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.findall(r"from (\w+)|import kvcompress", text)[0])
def test_snippets_run(snippet, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_answer_survives(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(SNIPPETS[0], "README.md", "exec"), {})
    assert "481793" in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_plain_loop(capsys):
    layers = runpy.run_path(str(ROOT / "examples" / "plain_loop.py"))["main"]()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(layers) == 4
    for layer in layers:
        assert layer.length == 120 == layer.k.shape[2]  # 100 kept, 20 appended, not a slot more allocated
        kept = layer.positions[0, :, :100]
        assert (kept.diff(dim=-1) > 0).all()
        assert kept[:, -16:].tolist() == [list(range(984, 1000))] * 2
