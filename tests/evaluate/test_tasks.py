"""Generators and files: deterministic, of the length asked for, answerable, and read back as written."""

from __future__ import annotations

import gzip
import json

import pytest

from kvcompress.cli import choose
from kvcompress.evaluate import generators, read_samples, write_samples
from kvcompress.evaluate.tasks import by_context, encode, first
from kvcompress.evaluate.text import text_samples

TASKS = generators.available()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("which", ["random_model", "mini"])
def test_deterministic_and_of_its_length(task, which, request):
    tokenizer = request.getfixturevalue(which)[1]
    length = 1500
    samples = generators.generate(task, tokenizer, length=length, count=4, seed=5)
    assert samples == generators.generate(task, tokenizer, length=length, count=4, seed=5)
    assert samples != generators.generate(task, tokenizer, length=length, count=4, seed=6)
    assert len({s.id for s in samples}) == len(samples) == 4
    for sample in samples:
        tokens = encode(sample, tokenizer)
        whole = len(tokens.context) + len(tokens.question) + len(tokens.forced)
        assert length - 200 < whole <= length
        # parts tokenise alone as they do together
        text = sample.context + sample.question + sample.answer_prefix
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= whole


@pytest.mark.parametrize("task", TASKS)
def test_answer_is_in_the_context(task, mini):
    for sample in generators.generate(task, mini[1], length=900, count=4):
        if task in ("few_shot", "variable_tracking", "niah_multivalue", "niah_multiquery", "long_list"):
            parts = sample.answer.split(", ")
            assert all(part in sample.context for part in parts)
        else:
            assert sample.answer in sample.context
        if sample.depth is not None:
            assert 0 <= sample.depth <= 1
            near = sample.context[int(sample.depth * (len(sample.context) - 1)) :][:120]
            assert sample.answer.split()[0] in near


@pytest.mark.parametrize("task", ["words_again", "pairs_again", "text_again"])
def test_answers_of_hundreds_of_tokens(task, mini):
    """What is to be given again stands at the front, with as much text behind it as fits."""
    (sample,) = generators.generate(task, mini[1], length=2048, count=1)
    assert sample.context.startswith(f"List: {sample.answer}\n")
    assert sample.question == "\nList again:"
    tokens = encode(sample, mini[1])
    assert 250 <= len(tokens.answer) <= 400
    assert mini[1].decode(tokens.prefix) == ":"


@pytest.mark.parametrize("task", ["long_list", "pairs_again"])
def test_lengths_with_more_keys_than_names(task, mini):
    (sample,) = generators.generate(task, mini[1], length=720_000, count=1)
    keys = [line.split(": ")[0] for line in sample.answer.split(", ")]
    assert len(keys) == len(set(keys)) > 5612  # adjectives times nouns


def test_a_length_too_short_for_the_facts_is_refused(mini):
    with pytest.raises(ValueError, match="length must leave room for 8 facts"):
        generators.generate("niah_multiquery", mini[1], length=90, count=1)


def test_files(tmp_path, mini):
    samples = generators.generate("passkey", mini[1], length=400, count=3)
    for name in ("a.jsonl", "a.jsonl.gz"):
        write_samples(tmp_path / name, samples)
        assert read_samples(tmp_path / name) == samples
    plain = {"context": "Key 7.\n", "question": "\nKey?", "answer_prefix": "\nAnswer:", "answer": "7", "other": 1}
    (tmp_path / "own.jsonl").write_text(json.dumps(plain) + "\n\n")
    (own,) = read_samples(tmp_path / "own.jsonl")
    assert (own.task, own.id, own.start, own.end) == ("own", "own.jsonl-1", " ", "\n")
    (tmp_path / "bad.jsonl").write_text('{"context": 3}\n')
    with pytest.raises(ValueError, match="line 1 is no sample"):
        read_samples(tmp_path / "bad.jsonl")


def test_bundled():
    path = choose.bundled("tasks/shared_2048.jsonl.gz", "--tasks")
    samples = read_samples(path)
    assert len(samples) == len(gzip.decompress(path.read_bytes()).splitlines()) == 680
    few = first(samples, 2)
    assert len(few) == 2 * 13
    assert all(len({s.context for s in group}) == 1 for group in by_context(samples))


def test_text(tmp_path, mini):
    (tmp_path / "t.txt").write_text("The grass is green. The sky is blue. " * 200)
    samples = text_samples(tmp_path / "t.txt", mini[1], length=300, count=3)
    assert len(samples) == 3
    for sample in samples:
        tokens = encode(sample, mini[1])
        assert abs(len(tokens.context) - 172) <= 1
        assert abs(len(tokens.answer) - 128) <= 1
    others = [
        *text_samples(tmp_path / "t.txt", mini[1], length=300, count=2),
        *text_samples(tmp_path / "t.txt", mini[1], length=300, count=3, answer=64),
    ]
    known = {sample.id: sample for sample in samples}
    assert all(known[sample.id] == sample for sample in others if sample.id in known)  # resumed, one id is one question
    with pytest.raises(ValueError, match="must have at least"):
        text_samples(tmp_path / "t.txt", mini[1], length=10**6, count=1)
