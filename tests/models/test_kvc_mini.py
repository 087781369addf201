"""The small trained model: answers stay right at a fraction of the entries, and all ways to generate agree."""

from __future__ import annotations

import copy
import gzip
import json

import pytest
import torch

from kvcompress.methods import create
from kvcompress.models import CompressedCache, attach
from tests.models.common import entries, padded
from tests.models.conftest import KVC_MINI

TASKS = ("niah_single", "passkey")


@pytest.fixture(scope="module")
def questions():
    """A few easy questions at 2048 tokens."""
    path = KVC_MINI.parent / "tasks" / "shared_2048.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return [next(row for row in rows if row["task"] == task) for task in TASKS]


def tokens(tokenizer, row):
    text = tokenizer(row["context"], add_special_tokens=True).input_ids
    text += tokenizer(row["question"] + row["answer_prefix"], add_special_tokens=False).input_ids
    return torch.tensor([text])


def answer(mini, cache, ids, **options):
    model, tokenizer = mini
    with attach(model):
        out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=12, **options)
    return [tokenizer.decode(row).split("\n")[0].strip() for row in out[:, ids.shape[1] :]]


def methods():
    return {
        "full": None,
        "snapkv": create("snapkv", budget=0.15),
        "squeeze": create("squeeze_attention", budget=0.15),
    }


@pytest.mark.parametrize("name", list(methods()))
def test_the_answers_stay_right(mini, questions, name):
    model, tokenizer = mini
    for row in questions:
        ids = tokens(tokenizer, row)
        cache = CompressedCache(model.config, methods()[name])
        assert answer(mini, cache, ids)[0] == row["answer"]
        stored = [layer.entries[0] for layer in cache.stats().layers]
        share = 1.0 if name == "full" else 0.15
        assert sum(stored) <= len(stored) * (share * ids.shape[1] + 12)


@pytest.mark.parametrize("name", ["full", "snapkv"])
def test_a_padded_batch_and_prompt_lookup_give_the_same(mini, questions, name):
    model, tokenizer = mini
    rows = [tokens(tokenizer, row) for row in questions]
    alone = [answer(mini, CompressedCache(model.config, methods()[name]), ids)[0] for ids in rows]
    ids, mask = padded(rows)
    assert answer(mini, CompressedCache(model.config, methods()[name]), ids, attention_mask=mask) == alone
    looked_up = [
        answer(mini, CompressedCache(model.config, methods()[name]), ids, prompt_lookup_num_tokens=3)[0] for ids in rows
    ]
    assert looked_up == alone


def test_questions_on_one_compressed_context(mini, questions):
    """The context is compressed once; each question is a turn of its own on a copy."""
    model, tokenizer = mini
    row = questions[0]
    context = torch.tensor([tokenizer(row["context"], add_special_tokens=True).input_ids])
    question = tokenizer(row["question"] + row["answer_prefix"], add_special_tokens=False).input_ids
    cache = CompressedCache(model.config, create("snapkv", budget=0.5))
    with attach(model), torch.no_grad():
        model(context, past_key_values=cache)
    kept = entries(cache)
    for _ in range(2):
        turn = copy.deepcopy(cache)
        ids = torch.cat([context, torch.tensor([question])], 1)
        assert len(answer(mini, turn, ids)[0]) > 0
        assert turn.stats().layers[0].entries[0] >= kept[0][0] + len(question)
    assert entries(cache) == kept
