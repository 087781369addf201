"""`kvcompress calibrate`: head profiles, the search, curves, and the files."""

from __future__ import annotations

import json

import pytest
import torch

from kvcompress.calibrated import predicted_quality
from kvcompress.cli.eval import pick_samples
from kvcompress.evaluate.calibrate import (
    HeadChange,
    contexts,
    fit_curve,
    halves,
    head_change,
    load_curve,
    save_curve,
    search_table,
)
from kvcompress.methods import create
from kvcompress.methods.baklava import CacheTable
from tests.cli.conftest import refused, run  # noqa: F401

WORDS = ("calibrate", "--device", "cpu", "--tasks", "passkey", "--lengths", "400", "--limit", "3", "--prompts", "2")


def samples(tokenizer):
    return pick_samples("passkey", "400", tokenizer, limit=3, seed=0, bundled_model=False)


def test_head_change_against_the_models_own_attention(random_model):
    """Values and outputs as the model's modules see them, eager, in float64 cosines."""
    model, _ = random_model
    prompts = [list(range(3, 60)), list(range(100, 130))]
    change = head_change(model, prompts)
    seen = {"v": {}, "o": {}, "stream": {}}
    handles = []
    for i, block in enumerate(model.model.layers):
        attention = block.self_attn
        handles.append(attention.v_proj.register_forward_hook(lambda _, __, out, i=i: seen["v"].__setitem__(i, out)))
        handles.append(
            attention.o_proj.register_forward_pre_hook(lambda _, args, i=i: seen["o"].__setitem__(i, args[0]))
        )
        handles.append(attention.register_forward_hook(lambda _, __, out, i=i: seen["stream"].__setitem__(i, out[0])))
    sums, tokens = torch.zeros(3, 2, dtype=torch.float64), 0
    try:
        for ids in prompts:
            with torch.inference_mode():
                model(torch.tensor([ids]))
            for i in range(3):
                v = seen["v"][i][0].double().unflatten(-1, (2, 1, 16))
                o = seen["o"][i][0].double().unflatten(-1, (2, 2, 16))
                cosine = torch.cosine_similarity(v[1:], o[1:], dim=-1)
                sums[i] += (1 - cosine).mean(-1).sum(0)
            tokens += len(ids) - 1
    finally:
        for handle in handles:
            handle.remove()
    assert torch.allclose(torch.tensor(change.heads, dtype=torch.float64), sums / tokens, atol=1e-5)
    assert len(change.layers) == 3
    assert all(0 <= x <= 2 for x in change.layers)
    assert head_change(model, [*prompts, [7]]) == change  # its only token is left out
    with pytest.raises(ValueError, match=r"head_change: prompts must have at least 2 tokens, got \[1\]"):
        head_change(model, [[7]])


def test_layer_factor():
    change = HeadChange(((0.2, 0.4), (0.6, 0.8)), (0.1, 0.3))
    assert change.importance(False) == change.heads
    weighed = change.importance(True)
    assert [round(x, 6) for row in weighed for x in row] == [0.1, 0.2, 0.9, 1.2]


def test_search_is_never_worse_than_uniform(random_model):
    model, tokenizer = random_model
    first, rest = halves(samples(tokenizer), 1)
    assert {s.context_id for s in first}.isdisjoint(s.context_id for s in rest)
    assert len(contexts(first, tokenizer)) == 1
    table, trials = search_table(model, tokenizer, rest, ((0.1, 0.2), (0.4, 0.1), (0.3, 0.3)), budget=40)
    assert len(trials) == 13
    assert [t.nll for t in trials] == sorted(t.nll for t in trials)
    assert trials[0].nll <= next(t.nll for t in trials if t.gamma == 0)
    assert (table.gamma, table.beta) == (trials[0].gamma, trials[0].beta)


def test_curve(random_model, tmp_path):
    model, tokenizer = random_model
    asked = samples(tokenizer)
    alpha, beta, triples = fit_curve(
        model, tokenizer, asked, lambda share: create("compactor", budget=share, sink=1, window=4), [0.1, 0.5]
    )
    assert len(triples) == 2 * len(asked)
    with torch.inference_mode():
        ids = torch.tensor([contexts(asked[:1], tokenizer)[0]])
        nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()
    assert triples[0][1] == pytest.approx(nll, rel=1e-4)
    assert all(0 < keep <= 1 and 0 < quality <= 1 for keep, _, quality in triples)
    assert 0 <= predicted_quality([0.5], [nll], alpha, beta)[0] <= 1
    save_curve(tmp_path / "curve.json", alpha, beta, model="a model")
    assert load_curve(tmp_path / "curve.json") == (alpha, beta)
    (tmp_path / "curve.json").write_text("{}")
    with pytest.raises(ValueError, match="load_curve: path must be a file of `kvcompress calibrate`"):
        load_curve(tmp_path / "curve.json")


def test_command_writes_a_table_that_generate_takes(run, checkpoint, tmp_path):  # noqa: F811
    out = tmp_path / "table.json"
    result = run(*WORDS, "--method", "baklava_like", "--model", checkpoint, "--budget", "40", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    found, table = json.loads(result.stdout), CacheTable.load(out)
    assert (table.num_layers, table.num_kv_heads) == (3, 2)
    assert (found["gamma"], found["beta"]) == (table.gamma, table.beta)
    assert found["nll"] <= found["nll_uniform"]
    assert sum(map(sum, found["keep"])) == pytest.approx(6, abs=1e-3)
    assert len(found["prompts_sha256"]) == 64
    words = ("generate", "--model", checkpoint, "--device", "cpu", "--method", "baklava_like", "--budget", "40")
    text = run(*words, "--set", f"table={out}", "--prompt", "a " * 100, "--max-new-tokens", "3", "--json")
    assert text.exit_code == 0, text.output


def test_command_writes_a_curve(run, checkpoint, tmp_path):  # noqa: F811
    out = tmp_path / "curve.json"
    result = run(
        *WORDS, "--method", "compactor", "--model", checkpoint, "--out", out, "--set", "sink=1", "--set", "window=4"
    )
    assert result.exit_code == 0, result.output
    assert "share to keep" in result.stdout
    assert load_curve(out) == tuple(json.loads(out.read_text())[name] for name in ("alpha", "beta"))


def test_command_says_what_to_do(refused, checkpoint, tmp_path):  # noqa: F811
    base = ("calibrate", "--model", checkpoint, "--device", "cpu", "--tasks", "passkey", "--lengths", "400")
    table = (*base, "--method", "baklava_like")
    assert "does not end in .json" in refused(*table, "--out", tmp_path / "table")
    assert "there is no folder" in refused(*table, "--out", tmp_path / "none" / "table.json")
    assert "a table has no parameters to set" in refused(*table, "--out", tmp_path / "t.json", "--set", "sink=1")
    assert "inner must be a method" in refused(*table, "--out", tmp_path / "t.json", "--inner", "pyramidkv")
    assert "no context left" in refused(*table, "--out", tmp_path / "t.json", "--limit", "1")
    curve = (*base, "--method", "compactor", "--out", tmp_path / "c.json")
    assert "has no parameter windows" in refused(*curve, "--set", "windows=4")
    assert not list(tmp_path.iterdir())
