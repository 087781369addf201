"""Own questions: seeded, for any tokenizer and any length, nothing to download.

A generator is given a source of randomness and a filler, and returns the facts it hides and the questions on them; `generate` fills
the context up to the length and spreads the facts over it. Adding one is a function under `@task`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kvcompress.evaluate._words import ADJECTIVES, CATEGORIES, NOUNS, VERBS
from kvcompress.evaluate.tasks import Sample

__all__ = ["Document", "available", "generate", "task"]

_ROOM = 8  # tokens left free at the end, for tokens that merge or split differently at joints


@dataclass
class Document:
    """What a generator makes of one context.

    Attributes:
        facts: sentences to be spread over the context, in this order.
        questions: ``(question, answer, number of the fact that holds it or None)``.
        head: what stands in front of everything.
        filler: the next sentence of haystack; None: the facts repeat `more` until the context is full.
        depths: where the facts go, 0 to 1 each; None: at random.
        ask, prefix: what stands before a question, and behind it before its answer.
    """

    facts: list[str]
    questions: Sequence[tuple[str, str, int | None]]
    head: str = ""
    filler: Callable[[], str] | None = None
    depths: list[float] | None = field(default=None)
    ask: str = "\nQuestion: "
    prefix: str = "\nAnswer:"


Generator = Callable[[random.Random, int, int], Document]
_REGISTRY: dict[str, Generator] = {}


def task(make: Generator) -> Generator:
    """Registers a generator ``(random, tokens of context, questions a context) -> Document`` under its function's name."""
    _REGISTRY[make.__name__] = make
    return make


def available() -> list[str]:
    """Names of all generators."""
    return sorted(_REGISTRY)


def generate(
    name: str, tokenizer: Any, *, length: int, count: int, seed: int = 0, per_context: int = 2
) -> list[Sample]:
    """`count` questions of one kind.

    Args:
        name: one of `available()`.
        tokenizer: counts the tokens.
        length: tokens of context, one question, its prefix and answer together.
        count: questions.
        seed: the same seed, name and tokenizer give the same questions.
        per_context: questions on each context; "multi_turn" asks more.

    Raises:
        ValueError: no such generator, or a length that its facts do not fit into.
    """
    if name not in _REGISTRY:
        raise ValueError(f"generate: name must be one of {', '.join(available())}, got {name!r}")
    samples: list[Sample] = []
    number = 0
    while len(samples) < count:
        source = random.Random(f"{seed}/{name}/{length}/{number}")
        document = _REGISTRY[name](source, length, per_context)
        asked = [(f"{document.ask}{question}", answer, fact) for question, answer, fact in document.questions]
        prefix = document.prefix
        longest = max(_count(tokenizer, f"{question}{prefix} {answer}\n") for question, answer, _ in asked)
        context, places = _fill(tokenizer, document, length - longest - _ROOM, source)
        own = f"{name}-{length}-{seed}-{number}"
        for turn, (question, answer, fact) in enumerate(asked[: count - len(samples)]):
            depth = None if fact is None else places[fact]
            samples.append(Sample(f"{own}-{turn}", own, name, length, context, question, prefix, answer, depth))
        number += 1
    return samples


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _fill(tokenizer: Any, document: Document, tokens: int, source: random.Random) -> tuple[str, list[float]]:
    """The context, and at which share of it each fact begins."""
    room = tokens - _count(tokenizer, document.head) - sum(_count(tokenizer, f" {fact}") for fact in document.facts) - 2
    if room < 0:
        raise ValueError(
            f"generate: length must leave room for {len(document.facts)} facts, which are {-room} tokens too long"
        )
    hay: list[str] = []
    while document.filler is not None:
        sentence = document.filler()
        room -= _count(tokenizer, f" {sentence}")
        if room < 0:
            break
        hay.append(sentence)
    depths = document.depths or sorted(source.random() for _ in document.facts)
    parts, place = [], 0
    for fact, depth in zip(document.facts, depths):
        upto = round(depth * len(hay))
        parts += hay[place:upto]
        place = max(place, upto)
        parts.append(fact)
    parts += hay[place:]
    text = document.head + " ".join(parts)
    found, start = [], len(document.head)
    for fact in document.facts:
        start = text.index(fact, start)
        found.append(start / max(1, len(text)))
        start += len(fact)
    return text + "\n", found


# --- what facts and hay are made of


def _prose(source: random.Random) -> Callable[[], str]:
    """Sentences that say nothing anybody asks for."""

    def sentence() -> str:
        pick = source.choice
        words = f"the {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} the {pick(ADJECTIVES)} {pick(NOUNS)}"
        if source.random() < 0.5:
            words += f" near the {pick(NOUNS)}"
        return words.capitalize() + "."

    return sentence


def _keys(source: random.Random, count: int) -> list[str]:
    """Different made-up names like "amber-falcon"; with a number behind where there are too few of these."""
    names: dict[str, None] = {}
    numbers = 2 * count // (len(ADJECTIVES) * len(NOUNS))
    while len(names) < count:
        name = f"{source.choice(ADJECTIVES)}-{source.choice(NOUNS)}"
        names[f"{name}-{source.randrange(10 * numbers)}" if numbers else name] = None
    return list(names)


def _number(source: random.Random) -> str:
    return str(source.randrange(10**5, 10**6))


_HEAD = "Some special facts are hidden within the following text. Remember them.\n"


def _needle(key: str, value: str) -> str:
    return f"The access code for {key} is {value}."


def _needles(source: random.Random, tokens: int, keys: int, questions: int) -> Document:
    names = _keys(source, keys)
    values = [_number(source) for _ in names]
    asked = source.sample(range(keys), min(keys, questions))
    return Document(
        [_needle(*pair) for pair in zip(names, values)],
        [(f"What is the access code for {names[i]}?", values[i], i) for i in asked],
        _HEAD,
        _prose(source),
    )


# --- the tasks


@task
def niah_single(source: random.Random, tokens: int, questions: int) -> Document:
    """One fact in a haystack."""
    return _needles(source, tokens, 1, 1)


@task
def niah_multikey(source: random.Random, tokens: int, questions: int) -> Document:
    """Many facts of one kind; one of them is asked."""
    return _needles(source, tokens, max(4, min(16, tokens // 128)), questions)


@task
def niah_multivalue(source: random.Random, tokens: int, questions: int) -> Document:
    """Three values of one key, all to be given in order."""
    key, *others = _keys(source, 3)
    values = [_number(source) for _ in range(5)]
    facts = [(key, values[0]), (key, values[1]), (key, values[2]), (others[0], values[3]), (others[1], values[4])]
    order = sorted(range(5), key=lambda i: (source.random(), i))
    facts = [facts[i] for i in order]
    mine = [value for name, value in facts if name == key]
    return Document(
        [_needle(*fact) for fact in facts],
        [(f"What are all the access codes for {key}?", ", ".join(mine), None)],
        _HEAD,
        _prose(source),
    )


@task
def niah_multiquery(source: random.Random, tokens: int, questions: int) -> Document:
    """Many facts; three are asked at once."""
    one = _needles(source, tokens, 8, 3)
    names = [
        question.removeprefix("What is the access code for ").removesuffix("?") for question, _, _ in one.questions
    ]
    text = f"What are the access codes for {names[0]}, {names[1]} and {names[2]}?"
    one.questions = [(text, ", ".join(answer for _, answer, _ in one.questions), None)]
    return one


@task
def passkey(source: random.Random, tokens: int, questions: int) -> Document:
    """A pass key in a haystack of one repeated sentence."""
    value = _number(source)
    sentence = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    return Document(
        [f"The pass key is {value}. Remember it. {value} is the pass key."],
        [("What is the pass key?", value, 0)],
        "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.\n",
        lambda: sentence,
    )


@task
def variable_tracking(source: random.Random, tokens: int, questions: int) -> Document:
    """A chain of four variables; all that hold the value, in order."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 4:
        name = f"{source.choice(letters)}{source.randrange(10, 100)}"
        names += [name] * (name not in names)
    value = _number(source)
    facts = [f"Assign {names[0]} = {value}.", *(f"Assign {b} = {a}." for a, b in pairwise(names))]
    question = f"Which variables hold the value {value}?"
    head = "Read the following text carefully and follow the chain of assignments that is hidden in it.\n"
    return Document(facts, [(question, ", ".join(names), None)], head, _prose(source))


@task
def dictionary(source: random.Random, tokens: int, questions: int) -> Document:
    """The whole context is pairs of key and value; one key is asked."""
    known = _keys(source, questions)
    values = [_number(source) for _ in known]
    used = set(known)

    def pair() -> str:
        while (key := f"{source.choice(ADJECTIVES)}-{source.choice(NOUNS)}-{source.randrange(10, 100)}") in used:
            pass
        used.add(key)
        return f"{key}: {_number(source)}"

    return Document(
        [f"{key}: {value}" for key, value in zip(known, values)],
        [(f"What is the value of {key}?", value, i) for i, (key, value) in enumerate(zip(known, values))],
        "Here is a list of keys and their values.\n",
        pair,
    )


@task
def long_list(source: random.Random, tokens: int, questions: int) -> Document:
    """A list of keys and values, all of it to be given again in order: an answer as long as an eighth to a quarter of the context."""
    names = _keys(source, max(4, tokens // 96))
    facts = [f"{name}: {_number(source)}" for name in names]
    question = "Give the whole list of keys and values again, in order."
    return Document(
        facts, [(question, ", ".join(facts), None)], "Here is a list of keys and their values.\n", _prose(source)
    )


def _again(source: random.Random, text: str) -> Document:
    """A text at the front, hay behind it, and the whole of the text to be given again."""
    asked = [("List again:", text, 0)]
    return Document([text + "\n"], asked, "List: ", _prose(source), [0.0], ask="\n", prefix="")


@task
def words_again(source: random.Random, tokens: int, questions: int) -> Document:
    """A list of words, all of it to be given again: hundreds of tokens at a length of 2048."""
    words = [*ADJECTIVES, *NOUNS, *VERBS]
    return _again(source, " ".join(source.choice(words) for _ in range(max(4, tokens // 16))))


@task
def pairs_again(source: random.Random, tokens: int, questions: int) -> Document:
    """Keys and values, all of them to be given again: hundreds of tokens at a length of 2048."""
    names = _keys(source, max(2, tokens // 64))
    return _again(source, ", ".join(f"{name}: {_number(source)}" for name in names))


@task
def text_again(source: random.Random, tokens: int, questions: int) -> Document:
    """A paragraph, all of it to be given again: hundreds of tokens at a length of 2048."""
    sentence = _prose(source)
    return _again(source, " ".join(sentence() for _ in range(max(1, tokens // 128))))


@task
def common_words(source: random.Random, tokens: int, questions: int) -> Document:
    """A list of words; the one that stands there most often."""
    words = source.sample(NOUNS, 24)
    weights = [30, *[4] * (len(words) - 1)]
    draw = source.choices
    head = "Read the following list of words and memorize how often each of them appears.\n"
    question = "Which word appears most often in the list above?"
    return Document([], [(question, words[0], None)], head, lambda: draw(words, weights)[0])


@task
def recall(source: random.Random, tokens: int, questions: int) -> Document:
    """How a sentence of the context goes on."""
    sentence = _prose(source)
    facts: dict[str, tuple[str, str]] = {}
    while len(facts) < questions:
        words = sentence().removesuffix(".").split()
        start, rest = " ".join(words[:5]), " ".join(words[5:])
        facts.setdefault(start, (f"{start} {rest}.", f"{rest}."))
    hay = _prose(source)

    def other() -> str:
        while any((line := hay()).startswith(start) for start in facts):
            pass
        return line

    asked = [
        (f'Continue this sentence from the text: "{start}', rest, i)
        for i, (start, (_, rest)) in enumerate(facts.items())
    ]
    return Document([fact for fact, _ in facts.values()], asked, _HEAD, other)


@task
def few_shot(source: random.Random, tokens: int, questions: int) -> Document:
    """Words with made-up labels of their categories; the label of a word that is not among them."""
    labels = dict(zip(CATEGORIES, source.sample(ADJECTIVES, len(CATEGORIES))))
    kept_back = {name: source.sample(words, 3) for name, words in CATEGORIES.items()}
    shown = [
        (word, labels[name]) for name, words in CATEGORIES.items() for word in words if word not in kept_back[name]
    ]

    def example() -> str:
        word, label = source.choice(shown)
        return f"{word}: {label}\n"

    chosen = [(source.choice(kept_back[name]), labels[name]) for name in source.sample(list(labels), min(questions, 4))]
    head = "Each word has a label that depends on its category.\n"
    return Document([], [(f"What is the label of {word}?", label, None) for word, label in chosen], head, example)


@task
def multi_turn(source: random.Random, tokens: int, questions: int) -> Document:
    """Several questions after one context, for a cache that is asked more than once."""
    return _needles(source, tokens, max(6, min(24, tokens // 96)), 6)
