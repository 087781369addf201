"""`kvcompress bench`: what it measures, what it refuses, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import report, run
from bench.ceilings import Ceilings
from bench.harness import Case, Runner, Work, summary, warmed
from kvcompress.cli import bench as command

LIMIT = Ceilings(read=1e9, copy=2e9, cache_read=4e9, matmul=1e12, exp=1e10, cache_bytes=1e6)
CPU = torch.device("cpu")


def kvcompress_bench(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "kvcompress", "bench", *words], capture_output=True, text=True)


def case(**options) -> Case:
    return Case("topk", "a label", lambda: [0], {"kvcompress": lambda x: x.append(1)}, **options)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(read=1e9), 1.0),
        (Work(read=1e9, written=1e9), 1.0),  # at the rate of copies, which counts both
        (Work(read=1e9, written=1e7), 1.0),  # hardly written: at the rate of reads
        (Work(read=1e6, cached=True), 1e6 / 4e9),
        (Work(read=2e6, cached=True), 2e6 / 1e9),  # does not fit the cache
        (Work(read=1e3, flop=1e12, exponentials=1e10), 1.0),
        (Work(read=1e3, exponentials=2e10), 2.0),
    ],
)
def test_floor_of_a_pass(work, seconds):
    assert work.floor(LIMIT) == pytest.approx(seconds)


def test_floor_of_a_case():
    assert case(read=1e9).floor(LIMIT) == pytest.approx(1.0)
    assert case(passes=[Work(read=1e9), Work(flop=1e12)]).floor(LIMIT) == pytest.approx(2.0)
    assert warmed(case(read=1e6)).floor(LIMIT) == pytest.approx(1e6 / 4e9)


def test_every_set_takes_its_turn():
    sets = []
    one = Case("topk", "", lambda: sets.append([]) or sets[-1], {"kvcompress": lambda x: x.append(1)}, footprint=2**30)
    runner = Runner(one, CPU)
    before = [len(own) for own in sets]
    for _ in range(3):
        assert runner.time("kvcompress") > 0
    assert [len(own) - n for own, n in zip(sets, before)] == [3 * runner.inner // len(sets)] * len(sets)


def test_what_fails_is_said():
    def broken(_):
        raise RuntimeError("no such thing\nlong story")

    one = case()
    one.variants["a peer"] = broken
    runner = Runner(one, CPU)
    assert runner.names() == ["kvcompress"]
    assert runner.failed == {"a peer": "RuntimeError: no such thing"}


def test_summary():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "best": 1.0}


@pytest.mark.parametrize("stage", [name for name in run.stages() if name != "methods"])
def test_every_case_has_tests_and_a_floor(stage):
    cases = list(run.stage_cases(stage, CPU, quick=True))
    assert cases
    for one in cases:
        files = run.test_files(one)
        assert files, one.op
        assert all((run.ROOT / name).exists() for name in files)
        assert one.floor(LIMIT) > 0
        assert one.footprint > 0
        assert any(name == "kvcompress" for name in one.variants)


def test_red_tests_stop_it(monkeypatch, capfd):
    def failing(one):
        return ["tests/cli/test_bench.py::a_test_that_does_not_exist"]

    monkeypatch.setattr(run, "test_files", failing)
    with pytest.raises(SystemExit, match="no figures until they pass"):
        run.main(["--device", "cpu", "--quick", "--op", "cosine_importance"])
    assert "floor" not in capfd.readouterr().out


def test_from_the_command_line(tmp_path):
    path = tmp_path / "figures.json"
    words = ["--device", "cpu", "--quick", "--op", "topk", "--case", "S8192 k 1024", "--rounds", "2", "--untested"]
    done = kvcompress_bench(*words, "--json", str(path))
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert figures["tested"] is False
    assert {row["op"] for row in figures["rows"]} == {"topk"}
    ours = next(row for row in figures["rows"] if row["variant"] == "kvcompress")
    assert ours["best_us"] > 0
    assert ours["floor_ratio"] == pytest.approx(ours["best_us"] / ours["floor_us"])
    peers = [row for row in figures["rows"] if row["variant"].startswith("torch")]
    assert peers
    for row in peers:
        assert row["times_ours"] == pytest.approx(row["best_us"] / ours["best_us"])
    assert any(row["variant"] == "flashinfer" for row in figures["not_measured"])
    assert "topk" in report.table(figures)


def test_no_case_fits():
    done = kvcompress_bench("--op", "nothing_of_that_name", "--device", "cpu")
    assert done.returncode == 1
    assert "no case fits" in done.stderr


def test_the_script_is_this_tree():
    path = command.script()
    assert path is not None
    assert path == Path(run.__file__)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_rows_of_the_table_are_cases(kind):
    device = torch.device(kind)  # cases make no tensor before they run
    core = {
        (one.op, one.label)
        for stage in run.stages()
        if stage != "methods"
        for one in run.stage_cases(stage, device, quick=False)
        if one.core
    }
    assert [row for row in report.TABLE[kind] if row not in core] == []
