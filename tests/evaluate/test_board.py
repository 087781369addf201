"""The board: complete, made in one go, nowhere behind a peer; and its command, ended and started again."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import quality
from kvcompress import methods

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result():
    return json.loads((quality.RESULTS / "quality_kvc_mini.json").read_text())


def test_every_method_has_every_line(result):
    """All of the registry and what else the board names, at both lengths and all budgets, in both modes, from one go."""
    assert set(methods.available()) <= set(quality.board(None))
    lines = {(x["method"], x["budget"], x["length"], x["question_visible"]): x for x in result["lines"]}
    names = quality.board(None)
    for length in (2048, 4096):
        for visible in (True, False):
            assert lines["full", 1.0, length, visible]["kept"] == 1
            for name in names:
                for keep in quality.KEEP:
                    line = lines[name, keep, length, visible]
                    assert line["n"] == result["what"]["questions"][str(length)], (name, keep, length)
                    assert line["low"] <= line["accuracy"] <= line["high"]
                    assert line["bytes"] > 0
        for name in names:
            timed = lines[name, quality.TIMED_AT, length, False]
            assert min(timed[seconds] for seconds in quality.SECONDS) > 0, name
    [go] = result["goes"]
    assert go["records"] >= sum(line["n"] for line in result["lines"])


def test_no_peer_is_ahead_of_the_same_method(result):
    assert quality.behind(result) == result["behind_peers"] == []


def test_behind_tells_what_is_behind():
    [peer] = [
        x
        for x in quality.peers()
        if (x["method"], x["keep"], x["length"]) == ("keydiff", 0.5, 2048) and x["question_visible"]
    ]
    line = {"method": "keydiff", "budget": 0.5, "length": 2048, "question_visible": True, "n": 312, "accuracy": 0.8, "low": 0.78,
            "high": 0.82, "kept": 0.5}  # fmt: skip
    [said] = quality.behind({"lines": [line]})
    assert f"peer {100 * peer['accuracy']:.1f}" in said
    assert quality.behind({"lines": [{**line, "high": 0.9}]}) == []
    [said] = quality.behind({"lines": [{**line, "high": 0.9, "kept": 0.6}]})
    assert "keeps 60.00 %" in said


def test_a_part_ended_and_started_again(tmp_path):
    def run(name, records):
        words = (
            "--methods",
            "snapkv,streaming_llm",
            "--keep",
            "0.25",
            "--lengths",
            "2048",
            "--contexts",
            "2",
            "--no-times",
        )
        out = tmp_path / f"{name}.json"
        done = subprocess.run(
            [sys.executable, ROOT / "bench" / "quality.py", *words, "--device", "cpu", "--jobs", "1", "--records", records, "--out", out],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "| `snapkv` |" in done.stdout
        assert out.with_suffix(".png").exists()
        return json.loads(out.read_text())

    whole = run("whole", tmp_path / "whole.jsonl")
    assert whole["wall_s"] > 0
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    records = [line for line in lines if '"id"' in line]
    for name, opener in (("rest.jsonl", open), ("rest.jsonl.gz", gzip.open)):
        rest = tmp_path / name
        with opener(rest, "wt") as sink:  # ended in the middle of a line, or of what is packed
            sink.write("\n".join(records[:3]) + "\n" + records[3][:40])
        if rest.suffix == ".gz":
            rest.write_bytes(rest.read_bytes()[:-9])
        again = run("rest", rest)
        assert [go["records"] for go in again["goes"]] == [len(records) - 3]
        same = ("method", "budget", "question_visible", "accuracy", "n", "entries", "bytes")
        assert [[x[n] for n in same] for x in again["lines"]] == [[x[n] for n in same] for x in whole["lines"]]
