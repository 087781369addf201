"""The evaluator: what it must give for caches whose accuracy is known beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from kvcompress import budget, methods, select
from kvcompress.evaluate import Candidate, evaluate, summarise
from kvcompress.evaluate.generators import generate
from kvcompress.evaluate.metrics import means, paired, wilson
from kvcompress.evaluate.reading import Reading, compress_directly, replayable
from kvcompress.evaluate.tasks import encode
from kvcompress.methods import Method
from kvcompress.models import attach
from kvcompress.pipeline import Stages

FULL = Candidate("full", None)


def make(name, budget, **parameters):
    return Candidate(name, methods.create(name, budget=budget, **parameters), budget)


@pytest.fixture(scope="module")
def samples(mini):
    kinds = ("niah_single", "passkey", "niah_multikey")
    return [s for kind in kinds for s in generate(kind, mini[1], length=512, count=2, seed=3)]


@dataclass(frozen=True)
class Drop:
    """Keeps everything but the entries in [start, end)."""

    start: int
    end: int
    queries = 0
    by_position = False

    def __call__(self, layer):
        place = torch.arange(layer.seq_len)
        dropped = (place >= self.start) & (place < self.end)
        return (~dropped).float().expand(*layer.keys.shape[:2], -1).contiguous()


@dataclass(frozen=True)
class DropMethod(Method):
    start: int = 0
    end: int = 0
    name = "drop"

    def stages(self):
        return Stages(score=Drop(self.start, self.end), budget=budget.Uniform(self.budget), select=select.TopK())


def greedy(model, tokenizer, sample):
    """What the model itself gives, without any of our caches."""
    tokens = encode(sample, tokenizer)
    prompt = torch.tensor([[*tokens.context, *tokens.question, *tokens.prefix]])
    out = model.generate(prompt, max_new_tokens=len(tokens.answer), do_sample=False, eos_token_id=-1)
    return out[0, prompt.shape[1] :].tolist() == tokens.answer


def test_full_cache_is_the_model(mini, samples):
    records = list(evaluate(*mini, samples, [FULL]))
    assert len(records) == 2 * len(samples)
    for sample in samples[:3]:
        own = greedy(*mini, sample)
        assert [r.right for r in records if r.id == sample.id] == [own, own]
    for r in records:
        assert r.entries == r.prompt_tokens
        assert r.agreement == 1
        assert r.kl < 1e-4
    assert any(r.right for r in records)


@pytest.mark.parametrize("visible", [True, False])
def test_without_its_needle_everything_is_wrong(mini, samples, visible):
    model, tokenizer = mini
    for sample in [s for s in samples if s.task in ("niah_single", "passkey")][:2]:
        place = sample.context.index(sample.answer)
        front = sample.context.rfind(".", 0, place - 1) + 1
        behind = sample.context.index(".", sample.context.rindex(sample.answer)) + 1
        start, end = (
            1 + len(tokenizer(sample.context[:n], add_special_tokens=False)["input_ids"]) for n in (front, behind)
        )
        length = len(encode(sample, tokenizer).context) + len(encode(sample, tokenizer).question) * visible
        needle = Candidate("needle", DropMethod(budget=length - (end - start), start=start, end=end))
        other = Candidate("other", DropMethod(budget=length - 8, start=8, end=16))
        full, without, unharmed = evaluate(
            model, tokenizer, [sample], [FULL, needle, other], question_visible=[visible]
        )
        assert full.right
        assert not without.right
        assert without.entries == length - (end - start)
        assert unharmed.right


DECODING = ("h2o", "tova", "obcache", "keydiff", "knorm")  # cut the prompt, or while decoding as well


def test_order_of_methods_and_batch_change_nothing(mini, samples):
    """Every method of the registry: rows of other lengths in the same batch, and methods before it, change no answer."""
    candidates = [FULL, *(make(name, 0.3) for name in methods.available())]
    candidates += [make(name, 0.2, decode=True) for name in DECODING]

    def results(order, batch):
        found = list(evaluate(*mini, samples[:5], order, batch=batch, timed=0))
        assert len(found) == 2 * 5 * len(candidates)
        return {r.key: r for r in found}

    alone, together = results(candidates, 1), results(candidates[::-1], 8)
    assert len({r.prompt_tokens for r in alone.values()}) > 2  # padded, where they are together
    for key, one in alone.items():
        other = together.pop(key)
        same = ("right", "tokens_right", "entries", "end_entries", "bytes", "prompt_tokens", "scorer", "agreement")
        assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same], key
        assert other.kl == pytest.approx(one.kl, rel=1e-3, abs=1e-3)
        assert other.nll == pytest.approx(one.nll, rel=1e-3, abs=1e-3)
    assert not together


def test_questions_of_one_context_are_asked_on_copies(mini, samples):
    """More questions on a context than fit into a batch, and fewer: the same records."""
    shared = [replace(s, context_id="one", context=samples[0].context) for s in samples]
    candidates = [FULL, make("snapkv", 0.3, window=16), make("adakv", 0.3), make("morphkv", 0.3)]
    few, many = (
        {
            r.key: (r.right, r.tokens_right, r.entries, r.end_entries, r.bytes)
            for r in evaluate(*mini, shared, candidates, batch=n)
        }
        for n in (4, 64)
    )
    assert few == many
    assert len(few) == 2 * len(shared) * len(candidates)


def test_a_model_with_sliding_layers():
    """Nothing of it can be read once for all methods: every prompt is the model's own, one row at a time."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=64, attn_logit_softcapping=None, max_position_embeddings=1024,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tokenizer = Bytes()
    samples = [
        replace(s, id=f"{i}", context_id="one")
        for i, s in enumerate(generate("passkey", tokenizer, length=300, count=1) * 2)
    ]
    candidates = [FULL, make("snapkv", 0.3, window=16), make("laq", 0.3)]
    records = list(evaluate(model, tokenizer, samples, candidates, batch=8))
    assert len(records) == 2 * 2 * len(candidates)
    ids = torch.tensor([tokenizer(samples[0].context)["input_ids"]])
    for r in records:
        assert r.kl < 1e-6 if r.method == "full" else r.kl > 0
        assert r.prefill_s > 1e-4  # the reading itself, not the order for it
        assert r.compress_s is None
        assert r.entries == (r.prompt_tokens if r.method == "full" else budget.entries(0.3, r.prompt_tokens))
    assert ids.shape[1] == next(r.prompt_tokens for r in records if not r.question_visible)


class Bytes:
    """A tokenizer of bytes without special tokens."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, **options):
        return bytes(ids).decode()


@pytest.mark.parametrize("name", [n for n in methods.available() if n != "sliding_window"])
def test_replay_is_the_real_path(mini, samples, name):
    """A method that is handed a prompt read before keeps the same entries as one the model meets while it reads."""
    model, tokenizer = mini
    tokens = encode(samples[0], tokenizer)
    method = methods.create(name, budget=0.25)
    assert replayable(model.config)
    with attach(model), torch.inference_mode():
        reading = Reading(model, tokens.context, [method])
        reading.extended([5, 6, 7]).compress(method)
        ours, again = reading.compress(method), reading.compress(method)
        real = compress_directly(model, tokens.context, method)
        for layer in reading.layers:
            assert torch.equal(ours.positions(layer), again.positions(layer))
            a, b = ours.positions(layer), real.positions(layer)
            assert a.shape == b.shape
            # the attention kernels may round differently between runs of other shapes: scores that tie to the last bit may swap
            assert (a == b).float().mean() > 0.99
        step = torch.tensor([tokens.question])
        logits = [model(step, past_key_values=cache, use_cache=True).logits for cache in (ours, real)]
    assert (logits[0] - logits[1]).abs().max() < 1e-2


def test_fed_answer_equals_greedy_decoding(mini, samples):
    """One pass over the answer and step-by-step decoding give the same verdict for methods that cut once."""
    model, tokenizer = mini
    from kvcompress.evaluate.runner import _at_once, _contexts, _picked, _step_by_step

    method = methods.create("snapkv", budget=0.3, window=16)
    [context] = _contexts([replace(s, context_id="one", context=samples[-1].context) for s in samples[-2:]], tokenizer)
    assert len(context.questions) == 2
    with attach(model), torch.inference_mode():
        reading = Reading(model, context.ids, [method])
        both = [_picked(reading.compress(method), [0, 0]) for _ in range(2)]
        together = _at_once(model, both[0], context.questions, False)
        alone, held, _ = _step_by_step(model, both[1], context.questions, False)
    for one, other, question in zip(together, alone, context.questions):
        n = len(question.tokens.answer)
        assert torch.equal(one[-n:].argmax(-1), other[-n:].argmax(-1))
        assert (one[-n:] - other[-n:]).abs().max() < 1e-3
    kept = budget.entries(0.3, len(context.ids))
    assert held == [kept + question.fed(False) for question in context.questions]


def test_perplexity_is_the_models_own(random_model):
    model, tokenizer = random_model
    sample = generate("passkey", tokenizer, length=300, count=1, seed=2)[0]
    full, cut = evaluate(*random_model, [sample], [FULL, make("streaming_llm", 0.1)], question_visible=[False])
    tokens = encode(sample, tokenizer)
    ids = torch.tensor([[*tokens.context, *tokens.question, *tokens.forced]])
    with torch.inference_mode():
        logp = model(ids).logits[0].double().log_softmax(-1)
    places = torch.arange(ids.shape[1] - len(tokens.answer), ids.shape[1])
    own = -logp[places - 1, ids[0, places]].mean().item()
    assert abs(full.nll - own) < 1e-4
    assert abs(cut.nll - own) > 1e-4
    [run, _] = summarise([full, cut])
    assert abs(math.log(run["perplexity"]) - own) < 1e-4


def test_resumed_is_one_go(random_model):
    samples = generate("niah_single", random_model[1], length=300, count=4, seed=1)
    candidates = [FULL, make("snapkv", 0.5, window=16)]
    whole = list(evaluate(*random_model, samples, candidates))
    half = whole[:5]
    rest = list(evaluate(*random_model, samples, candidates, done={r.key for r in half}))
    assert len(half) + len(rest) == len(whole)
    unequal = {"prefill_s": None, "compress_s": None, "decode_s": None, "kl": 0.0, "nll": 0.0}
    resumed = {r.key: r for r in half + rest}
    for one in whole:
        other = resumed.pop(one.key)
        assert replace(one, **unequal) == replace(other, **unequal)
        # other batches round otherwise: float32 logits of a few units, so some 1e-6 of each log-probability
        assert other.kl == pytest.approx(one.kl, rel=1e-3, abs=1e-4)
        assert other.nll == pytest.approx(one.nll, rel=1e-3, abs=1e-4)
    assert not resumed


def test_intervals_do_not_feign_certainty(random_model):
    """A task with one context, and answers that are all right, give the bootstrap nothing to draw from."""
    samples = [generate("passkey", random_model[1], length=300, count=1, seed=seed)[0] for seed in range(4)]
    [some, *_] = evaluate(*random_model, samples[:1], [FULL], question_visible=[False])

    def record(task, context, right):
        return replace(some, id=f"{task}-{context}", context_id=f"{task}-{context}", task=task, right=right)

    one_each = [record(task, 0, task in "ab") for task in "abc"]
    [line] = means(one_each)
    assert (line["low"], line["high"]) == wilson(2, 3)
    uneven = [record("a", 0, True), *(record("b", i, i < 2) for i in range(4))]
    [line] = means(uneven)
    assert line["accuracy"] == 0.75
    assert (line["low"], line["high"]) == wilson(0.75 * 3.2, 3.2)  # 2 ** 2 / (1 / 1 + 1 / 4) questions
    for right in (True, False):
        [line] = means([record(task, i, right) for task in "ab" for i in range(3)])
        assert (line["low"], line["high"]) == wilson(6 * right, 6)
    [line] = means([record(task, i, i > 0) for task in "ab" for i in range(6)])
    assert line["low"] < line["accuracy"] < line["high"]
    [line] = paired(one_each, [record(task, 0, True) for task in "abc"])
    assert line["low"] < line["difference"] < line["high"]
