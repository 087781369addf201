"""`kvcompress generate` on the bundled model."""

from __future__ import annotations

import json

import pytest

from kvcompress.cli import choose

MODEL = str(choose.bundled("kvc-mini", "--model"))
PROMPT = (
    "The grass is green. " * 60 + "The access code for amber-falcon is 481793. " + "The sky is blue. " * 60
    + "\n\nQuestion: What is the access code for amber-falcon?\nAnswer:"
)  # fmt: skip
KEYS = {
    "method", "parameters", "text", "prompt_tokens", "new_tokens", "kv_bytes", "full_kv_bytes", "kv_entries_per_layer",
    "logical_tokens", "prefill_s", "decode_s_per_token",
}  # fmt: skip


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("<bos>" + PROMPT)
    return path


def generate(run, *words):
    result = run("generate", "--model", MODEL, "--max-new-tokens", "6", "--device", "cpu", *words)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("chunk", [[], ["--chunk", "100"]])
def test_json(run, prompt_file, chunk):
    words = (
        "--method",
        "snapkv",
        "--budget",
        "96",
        "--set",
        "window=16",
        "--prompt-file",
        prompt_file,
        "--json",
        *chunk,
    )
    result = json.loads(generate(run, *words).stdout)
    assert set(result) == KEYS
    assert "481793" in result["text"]
    assert result["new_tokens"] == 6
    assert result["logical_tokens"] == result["prompt_tokens"] + 5  # the last token is never fed
    assert result["kv_entries_per_layer"] == [96 + 5] * 10
    assert result["kv_bytes"] < result["full_kv_bytes"] / 2
    assert result["prefill_s"] > 0
    assert result["decode_s_per_token"] > 0


def test_streams_the_answer_alone_to_stdout(run, prompt_file):
    result = generate(run, "--method", "full", "--prompt-file", prompt_file)
    assert result.stdout.strip().startswith("481793")
    assert "entries per layer" not in result.stdout
    assert "entries per layer" in result.stderr


def test_wrong_calls_say_what_to_do(refused, prompt_file, tmp_path):
    good = {"--model": MODEL, "--method": "snapkv", "--budget": "64", "--prompt": "Hello"}

    def call(*more, **changes):
        given = {**good, **{"--" + name.replace("_", "-"): value for name, value in changes.items()}}
        return refused("generate", *(word for pair in given.items() if pair[1] is not None for word in pair), *more)

    assert "choose among" in call(method="nope")
    assert "like 1024" in call(budget="-3")
    assert "config.json" in call(model=tmp_path / "nowhere")
    assert "save_pretrained" in call(model=tmp_path)
    assert "either --prompt" in call(prompt_file=prompt_file)
    assert "either --prompt" in call(prompt=None)
    assert "stdin" in call(prompt=None, prompt_file=tmp_path / "none.txt")
    assert "at least one word" in call(prompt="")
    assert "cpu, cuda" in call(device="toaster")
    assert "float16" in call(dtype="int8")
    assert "--set window=16" in call("--set", "window")
