"""`kvcompress methods` shows the registry."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from kvcompress.methods import available


def test_table(run):
    result = run("methods")
    assert result.exit_code == 0
    for name in available():
        assert name in result.stdout


def test_json(run):
    listed = json.loads(run("methods", "--json").stdout)["methods"]
    assert [entry["name"] for entry in listed] == list(available())
    for entry in listed:
        assert entry["summary"].endswith(".")
        assert entry["paper"]
        assert list(entry["parameters"]) == [field.name for field in fields(available()[entry["name"]])]
    snapkv = next(entry for entry in listed if entry["name"] == "snapkv")
    assert snapkv["parameters"]["budget"] == {"required": True}
    assert snapkv["parameters"]["window"] == {"required": False, "default": 32}


@pytest.mark.parametrize("name", available())
def test_one(run, name):
    result = run("methods", name)
    assert result.exit_code == 0
    assert result.stdout.startswith((available()[name].__doc__ or "").split(maxsplit=1)[0])


def test_unknown(refused):
    assert "snapkv" in refused("methods", "snapvk")
