"""`kvcompress demo`: one JSON object with what every run kept and answered."""

from __future__ import annotations

import gzip
import json

import pytest

from kvcompress.cli import choose
from kvcompress.cli.demo import Question, pick, read_questions

TASKS = choose.bundled("tasks/shared_2048.jsonl.gz", "--tasks")
KEYS = {
    "method", "parameters", "kv_bytes", "kv_entries_per_layer", "logical_tokens", "correct", "questions", "prefill_s",
    "decode_s_per_token", "answers",
}  # fmt: skip


def test_json(run):
    result = run("demo", "--tasks", TASKS, "--questions", "3", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    full, snapkv, squeezed = shown["runs"]
    assert [r["method"] for r in shown["runs"]] == ["full", "snapkv", "squeeze_attention+snapkv"]
    for r in shown["runs"]:
        assert set(r) == KEYS
        assert r["questions"] == len(r["answers"]) == 3
        assert r["correct"] == sum(answer["right"] for answer in r["answers"])
        assert r["logical_tokens"] == full["logical_tokens"]
        assert len(r["kv_entries_per_layer"]) == 10
        assert r["prefill_s"] > 0
        assert r["decode_s_per_token"] > 0
    assert full["correct"] == 3
    assert full["kv_entries_per_layer"] == [full["logical_tokens"]] * 10
    tenth = full["logical_tokens"] // 10
    assert all(abs(kept - tenth) <= 1 for kept in snapkv["kv_entries_per_layer"])
    assert len(set(squeezed["kv_entries_per_layer"])) > 1
    for r in (snapkv, squeezed):
        assert sum(r["kv_entries_per_layer"]) <= full["logical_tokens"]  # a tenth of ten layers
        assert 4 * r["kv_bytes"] < full["kv_bytes"]


def test_table_and_plot(run, tmp_path):
    picture = tmp_path / "kept.png"
    words = ("--method", "streaming_llm", "--budget", "256", "--questions", "1", "--plot", picture)
    result = run("demo", "--tasks", TASKS, "--device", "cpu", *words)
    assert result.exit_code == 0, result.output
    for shown in ("full", "streaming_llm", "ms/token", "of 1", "█"):
        assert shown in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_pick_takes_the_needle_tasks_in_turn():
    questions = read_questions(TASKS)
    picked = pick(questions, 8, seed=0)
    assert sorted(q.task for q in picked) == sorted(2 * ["niah_multikey", "niah_multiquery", "niah_single", "passkey"])
    assert picked == pick(questions, 8, seed=0) != pick(questions, 8, seed=1)
    assert len(pick(questions, 0, seed=0)) == len(questions)
    others = [Question("facts", "", "", "", "")]
    assert pick(others, 5, seed=0) == others


def test_wrong_calls_say_what_to_do(refused, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"task": "x"}\n')
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    assert "models/tasks/README.md" in refused("demo", "--tasks", tmp_path / "none.jsonl")
    assert "answer_prefix" in refused("demo", "--tasks", tmp_path / "bad.jsonl")
    assert "answer_prefix" in refused("demo", "--tasks", tmp_path / "bad.jsonl.gz")
    assert "at least one" in refused("demo", "--tasks", tmp_path / "empty.jsonl.gz")
    assert "choose among" in refused("demo", "--method", "nope")
    assert "like 1024" in refused("demo", "--budget", "2.0")
    assert "kernel_size" in refused("demo", "--set", "windw=3")
    assert "hub id" in refused("demo", "--model", tmp_path / "none")


@pytest.mark.parametrize("words", [["--plot", "kept.png"]])
def test_plot_without_matplotlib(refused, monkeypatch, words):
    monkeypatch.setattr("kvcompress.cli.plot.find_spec", lambda name: None)
    assert "pip install 'kvcompress[plots]'" in refused("demo", *words)
