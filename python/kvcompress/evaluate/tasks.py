"""Questions on long contexts: the record, its files, and which ones an evaluation takes."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["Sample", "Tokens", "by_context", "encode", "first", "read_samples", "write_samples"]


@dataclass(frozen=True)
class Sample:
    """One question on a context. The model reads ``context + question + answer_prefix`` and gives `answer`.

    Attributes:
        id: unique in its file.
        context_id: samples with the same one share the context.
        task: name of the kind of question.
        length: tokens of context, questions and answers together, as asked for.
        context, question, answer_prefix: the three parts of the prompt.
        answer: expected text; the model gives `start`, then it, then `end`.
        depth: where in the context the answer stands, 0 = front, 1 = end; None: nowhere or everywhere.
        start, end: what surrounds the answer. An empty end: nothing is expected behind the answer.
    """

    id: str
    context_id: str
    task: str
    length: int
    context: str
    question: str
    answer_prefix: str
    answer: str
    depth: float | None = None
    start: str = " "
    end: str = "\n"


@dataclass(frozen=True)
class Tokens:
    """A sample as token ids. Each part is tokenised alone, so no token spans two of them."""

    context: list[int]
    question: list[int]
    prefix: list[int]
    answer: list[int]

    @property
    def forced(self) -> list[int]:
        """What follows the question when the answer is fed to the model."""
        return [*self.prefix, *self.answer]

    @property
    def fed(self) -> int:
        """How many tokens go in before the answer's last one is predicted, the context aside."""
        return len(self.question) + len(self.prefix) + len(self.answer) - 1


def encode(sample: Sample, tokenizer: Any) -> Tokens:
    """Token ids of a sample; the context starts with the tokenizer's <bos>, if it has one.

    An empty prefix gets the last token before it: what is compressed must be followed by something that predicts the answer.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    answer = ids(f"{sample.start}{sample.answer}{sample.end}")
    context, question, prefix = [*bos, *ids(sample.context)], ids(sample.question), ids(sample.answer_prefix)
    if not prefix:
        prefix = [(question or context).pop()]
    return Tokens(context, question, prefix, answer)


def read_samples(path: str | PathLike[str]) -> list[Sample]:
    """All lines of a FILE.jsonl or FILE.jsonl.gz. Fields that `Sample` does not have are left out.

    Raises:
        ValueError: a line that is no sample; the message names it.
    """
    file = Path(path)
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    known = {field.name for field in fields(Sample)}
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is not a JSON object")
            if lacks := [name for name in ("context", "question", "answer_prefix", "answer") if name not in row]:
                raise ValueError(f"it lacks {', '.join(lacks)}")
            row.setdefault("id", f"{file.name}-{number}")
            row.setdefault("context_id", row["id"])
            row.setdefault("task", file.name.split(".")[0])
            row.setdefault("length", 0)
            samples.append(_checked(Sample(**{name: row[name] for name in known & row.keys()})))
        except ValueError as error:
            raise ValueError(f"{file}: line {number} is no sample ({error}); see models/tasks/README.md") from None
    return [_located(sample) for sample in samples]


def _checked(sample: Sample) -> Sample:
    for name in ("id", "context_id", "task", "context", "question", "answer_prefix", "answer", "start", "end"):
        if not isinstance(getattr(sample, name), str):
            raise ValueError(f"{name} must be a text, got {getattr(sample, name)!r}")
    if type(sample.length) is not int or sample.length < 0:
        raise ValueError(f"length must be a number of tokens, got {sample.length!r}")
    if sample.depth is not None and (type(sample.depth) not in (int, float) or not 0 <= sample.depth <= 1):
        raise ValueError(f"depth must be null or between 0 and 1, got {sample.depth!r}")
    for name in ("context", "answer"):
        if not getattr(sample, name):
            raise ValueError(f"{name} must not be empty")
    return sample


def _located(sample: Sample) -> Sample:
    """Fills in the depth where the answer stands in the context literally."""
    place = sample.context.find(sample.answer) if sample.depth is None and sample.answer else -1
    if place < 0:
        return sample
    return Sample(**{**asdict(sample), "depth": place / max(1, len(sample.context) - len(sample.answer))})


def write_samples(path: str | PathLike[str], samples: Iterable[Sample]) -> None:
    """The file that `read_samples` reads."""
    text = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    file = Path(path)
    file.write_bytes(gzip.compress(text.encode(), mtime=0) if file.suffix == ".gz" else text.encode())


def first(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first `limit` questions of each task and length, in file order; None: all."""
    taken: dict[tuple[str, int], int] = {}
    out = []
    for sample in samples:
        key = (sample.task, sample.length)
        taken[key] = taken.get(key, 0) + 1
        if limit is None or taken[key] <= limit:
            out.append(sample)
    return out


def by_context(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples of one context together, in order of first appearance."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.context_id, sample.context), []).append(sample)
    return list(groups.values())
