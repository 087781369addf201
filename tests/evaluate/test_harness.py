"""lm-eval's tasks through our caches, with a task and a data set made here. Skipped where the extra `eval` is not installed."""

from __future__ import annotations

import json

import pytest
import torch

from kvcompress import methods
from tests.cli.conftest import refused, run  # noqa: F401

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{ {target} }}}}"
"""
CHOICE = "doc_to_choice: choices\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
GENERATE = (
    "filter_list: [{name: digits, filter: [{function: regex, regex_pattern: '([0-9]+)'}, {function: take_first}]}]\n"
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    grass = "The grass is green. The sky is blue. " * 12
    rows = [
        {
            "context": f"{grass}The pass key is {key}. Remember it. {key} is the pass key. {grass}\nWhat is the pass key?\nAnswer:",
            "answer": str(key),
            "place": 0,
            "choices": [str(key), "11111", "22222"],
        }
        for key in (73914, 58206)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, target, rest in (
        ("own_choice", "multiple_choice", "place", CHOICE),
        ("own_words", "generate_until", "answer", GENERATE),
    ):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, data=data, target=target) + rest)
    return tmp_path


def test_choices_and_words_of_an_own_task(run, tasks):  # noqa: F811
    words = (
        "eval", "--methods", "snapkv:window=16,streaming_llm", "--budgets", "0.3", "--tasks", "lm_eval:own_choice,lm_eval:own_words",
        "--lm-eval-tasks", tasks, "--device", "cpu", "--json",
    )  # fmt: skip
    result = run(*words)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    rows = {(row["method"], row["task"]): row for row in shown["lm_eval"]}
    assert len(rows) == 3 * 2
    assert rows["full", "own_choice"]["value"] == rows["full", "own_words"]["value"] == 1
    assert rows["full", "own_choice"]["kept"] == 1
    for row in rows.values():
        assert row["n"] == 2
        assert row["metric"] == {"own_choice": "acc", "own_words": "exact_match,digits"}[row["task"]]
        assert row["question_visible"] is True
    assert abs(rows["snapkv:window=16", "own_words"]["kept"] - 0.3) < 0.01
    assert rows["streaming_llm", "own_words"]["value"] == 0  # the key is in the middle, which it drops
    assert shown["runs"] == []


def test_likelihood_is_the_models_own(random_model):
    pytest.importorskip("lm_eval")
    from kvcompress.evaluate.harness import CompressedLM

    model, tokenizer = random_model
    asked = CompressedLM(model, tokenizer, None)
    context, answers = asked.tok_encode("The grass is green." * 5), [[5, 6, 7], [9, 4]]
    found = asked._loglikelihood_tokens([(("", ""), context, answer) for answer in answers])
    assert len(asked.kept) == 1  # the answers share a cache
    for answer, (score, greedy) in zip(answers, found):
        with torch.inference_mode():
            logp = model(torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
        own = sum(logp[len(context) - 1 + i, token].item() for i, token in enumerate(answer))
        assert abs(score - own) < 1e-3
        assert not greedy
    evicts = CompressedLM(model, tokenizer, methods.create("streaming_llm", budget=20))
    assert evicts._loglikelihood_tokens([(("", ""), context, answers[0])])[0][0] != found[0][0]
    with pytest.raises(NotImplementedError, match="text:FILE"):
        asked.loglikelihood_rolling([])


def test_missing_extra_is_said(refused, monkeypatch):  # noqa: F811
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    assert "kvcompress[eval]" in refused("eval", "--tasks", "lm_eval:anything")
