"""Attention error, `kvcompress inspect`, `kvcompress tune` and its profiles."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from kvcompress import budget, methods
from kvcompress.evaluate.fidelity import attention_error
from kvcompress.evaluate.reading import Reading, compress_directly
from kvcompress.evaluate.tune import SHARES, Point, pareto
from kvcompress.models import CompressedCache, attach
from tests.cli.conftest import refused, run  # noqa: F401


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_attention_error_against_plain_softmax(random_model, name):
    model, _ = random_model
    ids, behind = list(range(3, 90)), [5, 9, 11]
    method = methods.create("snapkv", budget=30, window=8)
    if name == "adakv":  # heads of different counts
        method = methods.create("adakv", budget=30, inner=method)
    with attach(model), torch.inference_mode():
        reading = Reading(model, ids, [method], queries=len(behind))
        cache, whole = reading.compress(method), reading.compress(None)
        before = [t.clone() for t in reading.layer(1)[1:]]
        errors = attention_error(reading, [cache, whole], behind)
        assert all(torch.equal(a, b) for a, b in zip(before, reading.layer(1)[1:]))
        assert errors.shape == (2, 3, 4)
        assert errors[1].max() < 1e-5
        assert errors[0].min() > 0
        queries, keys, values = (t[0].double() for t in reading.extended(behind).layer(2))
        kept = cache.positions(2)[0]
        for head in range(4):
            q, k, v = queries[head, -3:], keys[head // 2], values[head // 2]
            outs = []
            for allowed in (set(range(len(ids))), set(kept[head // 2].tolist())):
                logits = q @ k.T * 16**-0.5
                for i in range(3):
                    for j in range(len(ids) + 3):
                        if (j < len(ids) and j not in allowed) or j > len(ids) + i:
                            logits[i, j] = -torch.inf
                outs.append(logits.softmax(-1) @ v)
            wanted = (outs[0] - outs[1]).norm() / outs[0].norm()
            assert abs(errors[0, 2, head] - wanted) < 1e-4


@pytest.mark.parametrize("name", ["snapkv", "adakv", "squeeze_attention", "laq"])
def test_readings_of_hybrid_models(name):
    """What is read once is what the model itself gives each method, and goes on as it would; sliding layers are left out."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=32, attn_logit_softcapping=None, max_position_embeddings=1024,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids, behind = [3 + 7 * i % 290 for i in range(120)], [5, 9, 11]
    method = methods.create(name, budget=40)
    with attach(model), torch.inference_mode():
        reading = Reading(model, ids, [method], queries=len(behind))
        assert reading.layers == [1, 3, 5]
        cache, whole, own = reading.compress(method), reading.compress(None), compress_directly(model, ids, method)
        assert all(torch.equal(cache.positions(i), own.positions(i)) for i in reading.layers)
        errors = attention_error(reading, [cache, whole], behind)
        ahead, anew = reading.extended(behind), Reading(model, [*ids, *behind], [method], queries=len(behind))
        for i in reading.layers:
            for mine, theirs in zip(ahead.layer(i), anew.layer(i)):
                torch.testing.assert_close(mine[:, :, -len(theirs[0, 0]) :], theirs, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="ids must be one prompt where layers do not attend in full, got 2"):
            Reading(model, [ids, ids], [method])
    assert errors.shape == (2, 3, 2)
    assert errors[1].max() < 1e-5 < errors[0].min()


def test_inspect(run, checkpoint, tmp_path, monkeypatch):  # noqa: F811
    words = (
        "inspect",
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--methods",
        "snapkv:window=8,full",
        "--budget",
        "0.2",
    )
    result = run(*words, "--task", "passkey", "--length", "700", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["question_visible"] is False
    cut, full = shown["runs"]
    assert cut["layers"] == [0, 1, 2]
    assert len(cut["error"]) == 3
    assert len(cut["error"][0]) == 4
    assert max(map(max, full["error"])) < 1e-5 < cut["mean_error"]
    assert len(cut["positions"][0][0]) == cut["entries"][0] == shown["prompt_tokens"] // 5
    (tmp_path / "t.txt").write_text("The grass is green. " * 40)
    result = run(*words, "--prompt-file", tmp_path / "t.txt", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert "error of each head" in result.stdout
    assert "the next tokens of" in result.stdout
    assert "question hidden" in run(*words, "--task", "passkey", "--length", "700").stdout
    monkeypatch.setenv("COLUMNS", "60")
    narrow = run(*words, "--prompt-file", tmp_path / "t.txt")
    for column in ("layer", "entries", "error of each head", "mean", "kept positions, 0 to"):
        assert column in narrow.stdout  # a narrow window breaks lines, no column goes
    assert (tmp_path / "p.png").exists()


def test_tune_finds_the_border_and_its_profile_loads(run, random_model, tmp_path):  # noqa: F811
    profile = tmp_path / "p.json"
    words = ("tune", "--max-loss", "0.0", "--tasks", "passkey,niah_single", "--lengths", "600", "--limit", "2")
    result = run(
        *words, "--methods", "keydiff,streaming_llm:rolling=False", "--device", "cpu", "--out", profile, "--json"
    )
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["found"]["loss"] <= 0
    below = [p for p in shown["points"] if p["bytes"] < shown["found"]["bytes"]]
    assert all(p["loss"] > 0 for p in below)
    method = methods.load_profile(profile)
    assert str(method) == shown["found"]["parameters"]
    assert method.budget in SHARES
    model, _ = random_model  # the cache object takes it, for any model
    cache = CompressedCache(model.config, method)
    with attach(model), torch.inference_mode():
        model(torch.arange(3, 203)[None], past_key_values=cache)
    cache.finish_prompt()
    assert {n for layer in cache.stats().layers for n in layer.entries} == {budget.entries(method.budget, 200)}
    losses = [p["loss"] for p in shown["pareto"]]
    assert losses == sorted(losses, reverse=True)
    (tmp_path / "q.txt").write_text("The grass is green. " * 30)
    base = (
        "generate",
        "--model",
        shown["model"],
        "--prompt-file",
        tmp_path / "q.txt",
        "--max-new-tokens",
        "2",
        "--json",
    )
    result = run(*base, "--method", profile, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parameters"] == str(method)


def test_tune_tries_splits_over_layers_and_heads():
    from kvcompress.cli.tune import _METHODS, _make

    made = [_make(name, 0.1).stages() for name in _METHODS.split(",")]
    assert any(stages.is_ragged for stages in made)
    assert any(stages.budget.wants_residual for stages in made)


def test_nothing_under_the_bound(run, checkpoint):  # noqa: F811
    words = (
        "tune",
        "--model",
        checkpoint,
        "--max-loss",
        "0",
        "--metric",
        "kl",
        "--methods",
        "streaming_llm:rolling=False",
    )
    result = run(*words, "--tasks", "passkey", "--lengths", "500", "--limit", "1", "--device", "cpu", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["found"] is None


@pytest.mark.parametrize("mode", ["visible", "hidden"])
def test_a_bound_that_says_nothing_is_said(run, checkpoint, mode):  # noqa: F811
    """Random weights answer nothing right, so no cache loses accuracy."""
    words = (
        "tune",
        "--model",
        checkpoint,
        "--max-loss",
        "0.01",
        "--methods",
        "keydiff",
        "--tasks",
        "passkey",
        "--lengths",
        "500",
    )
    result = run(*words, "--limit", "1", "--device", "cpu", *(["--question-visible"] if mode == "visible" else []))
    assert result.exit_code == 0, result.output
    assert f"question {mode}: all points" in result.stdout
    assert "The full cache answers none of these questions right" in result.stderr


@pytest.mark.parametrize("name", methods.available())
def test_profiles_hold_every_method(name, tmp_path):
    method = methods.create(name, budget=0.25)
    methods.save_profile(tmp_path / "p.json", method, note=1)
    assert methods.load_profile(tmp_path / "p.json") == method


def test_other_files_are_no_profiles(tmp_path, refused):  # noqa: F811
    for text in ("", "{}", "[1]"):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ValueError, match="path must be a file of `kvcompress tune`"):
            methods.load_profile(tmp_path / "p.json")
    base = ("generate", "--model", ".", "--prompt", "a", "--method")
    assert "no such file" in refused(*base, tmp_path / "other.json")


def test_a_prompt_file_is_a_text(tmp_path, refused, checkpoint):  # noqa: F811
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    for command in (("generate", "--method", "snapkv"), ("inspect", "--methods", "snapkv")):
        words = (*command, "--model", checkpoint, "--device", "cpu", "--prompt-file")
        assert "a.txt cannot be read" in refused(*words, tmp_path / "a.txt")
        assert "no such file" in refused(*words, tmp_path / "b.txt")


def test_pareto():
    def point(nbytes, loss):
        return Point("", None, 0.1, loss, 1, 1, 1, 0.1, nbytes, 1)

    points = [point(10, 0.5), point(5, 0.7), point(7, 0.9), point(20, 0.5), point(30, 0.0)]
    assert [p.bytes for p in pareto(points)] == [5, 10, 30]
