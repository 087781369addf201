"""`kvcompress eval` on a checkpoint with random weights: what it prints, writes, resumes, compares and refuses."""

from __future__ import annotations

import json

import pytest

from kvcompress.cli import choose
from tests.cli.conftest import refused, run  # noqa: F401

RUN_KEYS = {
    "method", "parameters", "budget", "task", "length", "question_visible", "accuracy", "low", "high", "n", "tokens_right",
    "agreement", "kl", "perplexity", "entries", "end_entries", "kept", "bytes", "prompt_tokens", "prefill_s", "compress_s", "decode_s", "scorer",
}  # fmt: skip


@pytest.fixture
def words(checkpoint):
    return (
        "eval", "--model", checkpoint, "--methods", "snapkv:window=8,streaming_llm", "--budgets", "0.25,100", "--tasks",
        "niah_single,multi_turn", "--lengths", "1500", "--limit", "2", "--device", "cpu",
    )  # fmt: skip


def test_json(run, words):  # noqa: F811
    result = run(*words, "--both", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert set(shown) == {"model", "device", "dtype", "questions", "wall_s", "runs", "means"}
    assert shown["questions"] == 4
    assert len(shown["runs"]) == (1 + 2 * 2) * 2 * 2  # candidates x tasks x modes
    for r in shown["runs"]:
        assert set(r) == RUN_KEYS
        assert r["n"] == 2
        assert r["low"] <= r["accuracy"] <= r["high"]
        if r["method"] == "full":
            assert r["entries"] == r["prompt_tokens"]
        elif r["budget"] == 100:
            assert r["entries"] == 100
            assert r["bytes"] == 3 * 2 * 100 * (2 * 16 * 4 + 4)  # layers x heads x entries x (K, V, position)
        else:
            assert abs(r["kept"] - 0.25) < 0.01
    assert all(line["decode_s"] > 0 and line["prefill_s"] > 0 for line in shown["means"])  # the first samples are timed
    snapkv = [r for r in shown["runs"] if r["method"] == "snapkv:window=8"]
    assert "window=8" in snapkv[0]["parameters"]


def test_table_plot_resume_and_compare(run, words, tmp_path):  # noqa: F811
    out, picture = tmp_path / "a.jsonl", tmp_path / "a.png"
    result = run(*words, "--question-visible", "--out", out, "--plot", picture)
    assert result.exit_code == 0, result.output
    for shown in ("full", "snapkv", "visible", "KL", "not comparable", "4 questions, 2 tasks"):
        assert shown in " ".join(result.stdout.split())
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = out.read_text().splitlines()
    assert len(lines) == 5 * 4

    cut = tmp_path / "b.jsonl"
    cut.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])  # a run that was ended in the middle of a line
    result = run(*words, "--question-visible", "--out", cut, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert sum(r["n"] for r in json.loads(result.stdout)["runs"]) == 5 * 4

    def verdicts(path):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return {(r["parameters"], r["budget"], r["id"]): (r["tokens_right"], r["entries"], r["bytes"]) for r in rows}

    assert verdicts(cut) == verdicts(out)
    assert len(cut.read_text().splitlines()) == 5 * 4

    whole = cut.read_text()
    other = run(*words, "--question-visible", "--out", cut, "--resume", "--dtype", "bfloat16")
    assert other.exit_code == 2
    assert "float32, this run of" in other.stderr
    assert cut.read_text() == whole

    result = run("eval", "--compare", out, cut, "--json")
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout)["runs"]
    assert compared
    assert all(line["difference"] == line["gained"] == line["lost"] == 0 for line in compared)


def test_text_and_files(run, checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "t.txt").write_text("The grass is green. The sky is blue. " * 60)
    line = {"context": "Key 7. " * 40, "question": "\nKey?", "answer_prefix": "\nAnswer:", "answer": "7"}
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    base = (
        "eval",
        "--model",
        checkpoint,
        "--methods",
        "snapkv:window=8",
        "--budgets",
        "0.5",
        "--device",
        "cpu",
        "--json",
    )
    shown = json.loads(run(*base, "--tasks", f"text:{tmp_path / 't.txt'}", "--lengths", "400", "--limit", "2").stdout)
    full, half = shown["runs"]
    assert (full["task"], full["agreement"], full["n"]) == ("text:t.txt", 1, 2)
    assert full["kl"] < half["kl"]
    assert full["perplexity"] > 1
    assert (
        full["end_entries"] - full["entries"] == 128
    )  # an empty prefix: the prompt's last token is fed, the answer's is not
    shown = json.loads(run(*base, "--tasks", tmp_path / "own.jsonl").stdout)
    assert [r["task"] for r in shown["runs"]] == ["own", "own"]


def test_bundled_model_by_default(run):  # noqa: F811
    words = ("eval", "--methods", "snapkv", "--budgets", "0.5", "--tasks", "passkey", "--limit", "1", "--device", "cpu")
    shown = json.loads(run(*words, "--json").stdout)
    assert shown["model"] == str(choose.bundled("kvc-mini", "--model"))
    assert shown["runs"][0]["accuracy"] == 1


def test_refuses(refused, words, tmp_path):  # noqa: F811
    base = words[:3]
    assert "--tasks: no task is called" in refused(*base, "--tasks", "nothing", "--device", "cpu")
    assert "--methods: no method is called" in refused(*base, "--methods", "nothing")
    assert "of another type than it takes, got window='wide'" in refused(*base, "--methods", "snapkv:window=wide")
    assert "window is not key=value" in refused(*base, "--methods", "snapkv:window")
    assert "the ops run on cpu and cuda alone" in refused(*base, "--device", "meta")
    for bound in ("-1", "nan", "inf"):
        assert "is not a bound" in refused("tune", *base[1:], "--max-loss", bound)
    assert "no such file" in refused(*base, "--tasks", "x.jsonl", "--device", "cpu")
    assert "--resume needs --out" in refused(*base, "--resume")
    (tmp_path / "a.jsonl").write_text("")
    assert "exists" in refused(*base, "--out", tmp_path / "a.jsonl")
    assert "no such file" in refused("eval", "--compare", tmp_path / "x", tmp_path / "a.jsonl")
    assert "room" in refused(*base, "--tasks", "niah_multiquery", "--lengths", "90", "--device", "cpu")
    assert "tokens are too few" in refused(*base, "--tasks", "passkey", "--lengths", "0", "--device", "cpu")
    assert "--methods names nothing" in refused(*base, "--methods", "")
    assert "--budgets names nothing" in refused(*base, "--budgets", ",")
    for budget in ("0", "1.5", "-1"):
        assert f"--budgets {budget} is neither" in refused(*base, "--budgets", budget)


def test_refuses_before_the_work(refused, words, tmp_path):  # noqa: F811
    """What could not be written at the end is said before a model is loaded."""
    base = ("--model", tmp_path / "none", "--methods", "snapkv")
    (tmp_path / "folder.json").mkdir()
    for command in (("eval", "--resume"), ("tune", "--max-loss", "0.1")):
        assert "cannot be written" in refused(*command, *base, "--out", tmp_path / "folder.json")
    for command in (("eval",), ("tune", "--max-loss", "0.1")):
        assert "there is no folder" in refused(*command, *base, "--out", tmp_path / "no" / "a.json")
    for command in ("eval", "inspect"):
        assert "there is no folder" in refused(command, *base, "--plot", tmp_path / "no" / "a.png")
        assert "does not end like a picture" in refused(command, *base, "--plot", tmp_path / "a.txt")
        assert "--methods names nothing" in refused(command, *base[:2], "--methods", " ")
    assert "no such folder" in refused("eval", *base, "--out", tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_refuses_files_that_are_no_questions(refused, words, tmp_path):  # noqa: F811
    line = {"id": "a", "context": "Key 7. ", "question": "\nKey?", "answer_prefix": "\nAnswer:", "answer": "7"}
    lacking = {name: line[name] for name in ("context", "question")}
    for wrong, said in (
        ([], "own.jsonl has no line"),
        ([[1, 2]], "line 1 is no sample (it is not a JSON object)"),
        ([{**line, "depth": 3}], "depth must be null or between 0 and 1, got 3"),
        ([{**line, "length": -1}], "length must be a number of tokens, got -1"),
        ([lacking], "line 1 is no sample (it lacks answer_prefix, answer)"),
        ([line, {**line, "id": "b", "answer": 7}], "line 2 is no sample (answer must be a text, got 7)"),
        ([{**line, "context": ""}], "context must not be empty"),
        ([{**line, "length": "long"}], "length must be a number of tokens"),
        ([line, line], "two questions have the id 'a'"),
    ):
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
        assert said in refused(*words[:3], "--tasks", tmp_path / "own.jsonl", "--device", "cpu")
    (tmp_path / "own.jsonl").write_text(json.dumps({**line, "length": 2048}) + "\n{broken\n")
    assert "line 2 is no sample" in refused(*words[:3], "--tasks", tmp_path / "own.jsonl", "--device", "cpu")
    (tmp_path / "own.jsonl").write_text(json.dumps({**line, "length": 2048}) + "\n")
    said = refused(*words[:3], "--tasks", tmp_path / "own.jsonl", "--lengths", "64", "--device", "cpu")
    assert "own.jsonl has no question of --lengths 64" in said
    assert "its lengths are 2048" in said
    for name, data in (("a.jsonl.gz", b"{}"), ("b.jsonl", b"\xff\xfe")):
        (tmp_path / name).write_bytes(data)
        assert f"{name} cannot be read" in refused(*words[:3], "--tasks", tmp_path / name, "--device", "cpu")


def test_a_file_that_is_no_record_is_left_as_it_is(refused, words, tmp_path):  # noqa: F811
    other = tmp_path / "other.jsonl"
    for text in ('{"context": "a"}\n', "my notes\nin two lines\n", "a line without an end"):
        other.write_text(text)
        assert "line 1 is no record" in refused("eval", "--compare", other, other)
        assert "line 1 is no record" in refused(*words, "--out", other, "--resume")
        assert other.read_text() == text


def test_a_model_without_tokenizer(refused, checkpoint, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert "has no tokenizer that loads" in refused("eval", "--model", tmp_path, "--device", "cpu")


def test_models_that_cannot_do_what_is_asked(refused, checkpoint, tmp_path):  # noqa: F811
    """Said before any work, with the name of what does not go; no file is begun."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, GPT2Config

    def saved(name, config):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / name)
        return ("--model", tmp_path / name, "--device", "cpu")

    gpt2 = saved("gpt2", GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=512))
    falcon = saved(
        "falcon", FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=False)
    )
    task, (text, out) = ("--tasks", "passkey", "--lengths"), (tmp_path / "t.txt", tmp_path / "a.jsonl")
    text.write_text("The grass is green. " * 40)
    said = refused("eval", *gpt2, "--methods", "snapkv,streaming_llm", *task, "400", "--out", out)
    assert "--methods streaming_llm: attach: this method moves keys" in said
    assert not out.exists()
    for command in (("eval", "--out", out), ("tune", "--max-loss", "1")):
        assert "more than the 512 positions" in refused(*command, *gpt2, "--methods", "snapkv", *task, "700")
    assert not out.exists()
    for command in (("inspect", "--methods"), ("generate", "--budget", "0.5", "--method")):
        assert "more than the 512 positions" in refused(*command, "snapkv", *gpt2, "--prompt-file", text)
    assert "must take registered attention functions" in refused("eval", *falcon)
    few = saved("few", GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2))
    said = refused("eval", *few, "--methods", "snapkv", *task, "400")
    assert "--tasks: the tokenizer gives token" in said
    assert "and the model embeds 40" in said
    weights = tmp_path / "few" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "few did not load: Error while deserializing" in refused("eval", *few)


def test_what_is_named_twice_counts_once(run, words):  # noqa: F811
    twice = [{"0.25,100": "0.25,0.250", "1500": "1500,1500"}.get(str(word), word) for word in words]
    shown = json.loads(run(*twice, "--json").stdout)
    assert shown["questions"] == 4
    assert len(shown["runs"]) == (1 + 2) * 2  # candidates x tasks
    assert {r["n"] for r in shown["runs"]} == {2}


def test_a_text_needs_a_tokenizer_that_knows_places(refused, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig

    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "t.txt").write_text("The grass is green. " * 40)
    words = (
        "eval",
        "--model",
        tmp_path,
        "--tasks",
        f"text:{tmp_path / 't.txt'}",
        "--lengths",
        "200",
        "--device",
        "cpu",
    )
    assert "t.txt: the tokenizer must be a fast one" in refused(*words)


def test_budgets_beyond_the_prompt_keep_it_all(run, words):  # noqa: F811
    wide = [word if word != "0.25,100" else "100000" for word in words]
    runs = json.loads(run(*wide, "--json").stdout)["runs"]
    assert {r["kept"] for r in runs} == {1}
    assert max(r["kl"] for r in runs) < 1e-4


def test_long_continuation_of_methods_that_evict(run, checkpoint, tmp_path):  # noqa: F811
    """A long text behind the prompt: what evicts while decoding holds its budget, what cuts once grows."""
    (tmp_path / "t.txt").write_text("The grass is green. The sky is blue. " * 40)
    words = (
        "eval", "--model", checkpoint, "--methods", "streaming_llm,snapkv:window=8", "--budgets", "60", "--tasks",
        f"text:{tmp_path / 't.txt'}", "--lengths", "400", "--limit", "1", "--answer-tokens", "180", "--device", "cpu", "--json",
    )  # fmt: skip
    runs = {r["method"]: r for r in json.loads(run(*words).stdout)["runs"]}
    assert runs["full"]["end_entries"] == 400  # <bos> is one more, the last token is only predicted
    assert runs["snapkv:window=8"]["end_entries"] == 60 + 180
    assert runs["streaming_llm"]["end_entries"] == 60
    assert runs["streaming_llm"]["prompt_tokens"] == 400 - 180


def test_a_model_without_a_layer_to_compress_is_refused(refused, checkpoint, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    said = refused("eval", "--model", tmp_path, "--tasks", "passkey", "--lengths", "400", "--device", "cpu")
    assert "config must have a full_attention layer" in said
