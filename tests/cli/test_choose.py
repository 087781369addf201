"""Words of a command line -> methods, models, files; every wrong one says what to do."""

from __future__ import annotations

import pytest
import typer

from kvcompress.cli import choose


def test_budgets():
    assert [choose.parse_budget(text) for text in ("1024", "0.1", "1.0", "1")] == [1024, 0.1, 1.0, 1]
    assert isinstance(choose.parse_budget("1"), int)


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "0.0", "1.5", "nan", "inf", "-0.1"])
def test_bad_budgets(text, capsys):
    with pytest.raises(typer.Exit):
        choose.parse_budget(text)
    assert "like 1024" in capsys.readouterr().err


def test_full_is_no_method():
    assert choose.method("full", 100) is None


def test_settings_go_where_they_belong():
    method = choose.method("squeeze_attention+snapkv", 0.1, ["window=16", "p=0.3", "pool=avg"])
    assert (method.name, method.budget, method.p) == ("squeeze_attention", 0.1, 0.3)
    assert (method.inner.name, method.inner.budget, method.inner.window, method.inner.pool) == (
        "snapkv",
        0.1,
        16,
        "avg",
    )


@pytest.mark.parametrize(
    ("words", "settings", "told"),
    [
        ("snapvk", [], "choose among: full"),
        ("snapkv+nothing", [], "choose among"),
        ("snapkv", ["windw=3"], "kernel_size"),
        ("snapkv", ["window"], "--set window=16"),
        ("snapkv", ["kernel_size=4"], "kvcompress methods snapkv"),
        ("snapkv", ["window=five"], "kvcompress methods snapkv"),
        ("full", ["window=3"], "no parameter"),
        ("snapkv+streaming_llm", [], "kvcompress methods snapkv"),
    ],
)
def test_bad_methods(words, settings, told, capsys):
    with pytest.raises(typer.Exit):
        choose.method(words, 64, settings)
    assert told in capsys.readouterr().err


def test_bundled_models_are_found_over_the_environment(tmp_path, monkeypatch):
    (tmp_path / "kvc-mini").mkdir()
    monkeypatch.setenv("KVCOMPRESS_MODELS", str(tmp_path))
    assert choose.bundled("kvc-mini", "--model") == tmp_path / "kvc-mini"


def test_missing_bundle(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choose.kvcompress, "__path__", [str(tmp_path / "a" / "b")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVCOMPRESS_MODELS", raising=False)
    with pytest.raises(typer.Exit):
        choose.bundled("kvc-mini", "--model")
    assert "KVCOMPRESS_MODELS" in capsys.readouterr().err
