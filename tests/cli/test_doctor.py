"""`kvcompress doctor` and what it can tell."""

from __future__ import annotations

import json

import pytest
import torch

from kvcompress.cli import doctor


def test_table(run):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for words in ("python", torch.__version__, "libkvcompress.so", "transformers"):
        assert words in result.stdout


def test_json(run):
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert {"what", "state", "found", "do"} == set(report["findings"][0])
    built = next(finding for finding in report["findings"] if finding["what"] == "built")
    assert "0.1.0" in built["found"]


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("80-real;90-real;100", (9, 0), True),
        ("80-real,90-real,100", (9, 0), True),
        ("80-real;90-real;100", (8, 6), True),  # a binary runs on later GPUs of its own major version
        ("80-real;90-real;100", (12, 0), True),  # PTX of 100
        ("80-real;90-real;100", (7, 5), False),
        ("90-real", (10, 0), False),
        ("90-virtual", (10, 0), True),
        ("86-real", (8, 0), False),
        ("90a-real", (9, 0), True),
        ("", (9, 0), False),
    ],
)
def test_covers(architectures, capability, covered):
    assert doctor.covers(architectures, capability) is covered


class Gpu:
    name, major, minor = "Some GPU", 7, 5


def test_a_gpu_without_code_is_broken(run, monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    finding = next(f for f in json.loads(result.stdout)["findings"] if f["what"] == "GPU 0")
    assert finding["state"] == "broken"
    assert "CMAKE_CUDA_ARCHITECTURES=75-real" in finding["do"]


def test_a_driver_without_cuda_torch_is_a_note(run, monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    result = run("doctor", "--json")
    assert result.exit_code == 0
    finding = next(f for f in json.loads(result.stdout)["findings"] if f["what"] == "GPU")
    assert "install a CUDA build of torch" in finding["do"]


def test_missing_extras_are_notes(run, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    result = run("doctor", "--json")
    assert result.exit_code == 0
    missing = [f for f in json.loads(result.stdout)["findings"] if f["state"] == "note"]
    assert "pip install 'kvcompress[plots]'" in [f["do"] for f in missing]


def test_an_old_extra_is_a_note(run, monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "4.57.1")
    result = run("doctor", "--json")
    finding = next(f for f in json.loads(result.stdout)["findings"] if f["what"] == "transformers")
    assert finding["state"] == "note"
    assert "4.57.1" in finding["found"]
