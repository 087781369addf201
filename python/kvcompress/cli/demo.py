"""`kvcompress demo`: questions on 4k-token documents, answered with the full cache and with a tenth of it."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Group
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from kvcompress.cli import choose
from kvcompress.cli.console import fail, notes, print_json, results
from kvcompress.cli.report import bars, per_layer, size, span

__all__ = ["Question", "Run", "demo", "pick", "read_questions"]

_TASKS = "tasks/shared_4096.jsonl.gz"
_METHODS = ("snapkv", "squeeze_attention+snapkv")
_NEEDLES = ("niah_single", "niah_multikey", "niah_multiquery", "passkey")
_WINDOW = 16  # observing queries: about the length of a question of these tasks
_MOST_TOKENS = 64  # longer than any answer of the tasks


@dataclass(frozen=True)
class Question:
    """A line of a task file, as models/tasks/README.md describes it."""

    task: str
    context: str
    question: str
    answer_prefix: str
    answer: str


@dataclass
class Answer:
    """What one run gave for one question."""

    task: str
    expected: str
    given: str
    right: bool
    prompt_tokens: int
    logical_tokens: int
    kv_bytes: int
    kv_entries_per_layer: list[int]
    prefill_s: float
    decode_s: float
    steps: int


@dataclass
class Run:
    """One method over all questions."""

    method: str
    parameters: str
    answers: list[Answer] = field(default_factory=list)

    @property
    def correct(self) -> int:
        """Answers that match token by token."""
        return sum(answer.right for answer in self.answers)

    def summary(self) -> dict[str, Any]:
        """Sizes are means over the questions."""
        answers = self.answers
        layers = zip(*(answer.kv_entries_per_layer for answer in answers))
        return {
            "method": self.method,
            "parameters": self.parameters,
            "kv_bytes": round(fmean(answer.kv_bytes for answer in answers)),
            "kv_entries_per_layer": [round(fmean(layer)) for layer in layers],
            "logical_tokens": round(fmean(answer.logical_tokens for answer in answers)),
            "correct": self.correct,
            "questions": len(answers),
            "prefill_s": fmean(answer.prefill_s for answer in answers),
            "decode_s_per_token": sum(a.decode_s for a in answers) / sum(a.steps for a in answers),
            "answers": [asdict(answer) for answer in answers],
        }


def demo(
    method: Annotated[
        list[str] | None, typer.Option(help="Beside the full cache; may be repeated; A+B runs B inside A.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Entries a head keeps in each layer (400), or their share (0.1).")
    ] = "0.1",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of all methods that have it, key=value.")
    ] = None,
    tasks: Annotated[Path | None, typer.Option(help="Other questions: FILE.jsonl[.gz], see models/tasks.")] = None,
    questions: Annotated[int, typer.Option(min=0, help="How many; 0 asks all of the file.")] = 4,
    seed: Annotated[int, typer.Option(help="Which questions of the file.")] = 0,
    model: Annotated[str | None, typer.Option(help="Another model; kvc-mini if none is given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw which positions each layer kept: FILE.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
) -> None:
    """Ask about needles in 4k-token documents, with the full cache and with a tenth of its entries."""
    entries = choose.parse_budget(budget)
    words = ["full", *(name for name in method or _METHODS if name != "full")]
    unused = {text.partition("=")[0] for text in settings or ()}.difference(*map(choose.parameters, words))
    if unused:
        known = ", ".join(sorted(set().union(*map(choose.parameters, words))))
        fail(f"no method here has the parameter {', '.join(sorted(unused))}", f"they have: {known}")
    chosen = {name: choose.method(name, entries, _settings(name, settings or ())) for name in words}
    if plot is not None:
        from kvcompress.cli.plot import require_plot

        require_plot(plot)
    asked = pick(read_questions(tasks or choose.bundled(_TASKS, "--tasks FILE")), questions, seed)
    on = choose.device(device)
    loaded, tokenizer = choose.load_model(model or str(choose.bundled("kvc-mini", "--model")), on, "auto")

    runs = [Run(name, "" if built is None else str(built)) for name, built in chosen.items()]
    kept: dict[str, list[Any]] = {}
    with Progress(console=notes(), transient=True) as progress, torch.inference_mode():
        task = progress.add_task("answering", total=len(asked) * len(runs))
        short = replace(asked[0], context=asked[0].context[-2000:])
        ask(loaded, tokenizer, short, None)  # warms the machine up, so that the first run is not the slowest
        for question in asked:
            for run in runs:
                answer, positions = ask(loaded, tokenizer, question, chosen[run.method])
                run.answers.append(answer)
                kept.setdefault(run.method, positions)
                progress.advance(task)

    if plot is not None:
        from kvcompress.cli.plot import draw

        tokens = runs[0].answers[0].prompt_tokens
        draw(plot, kept, tokens, _where(tokenizer, asked[0]))
        notes().print(f"drew the first question into {plot}", highlight=False)
    if as_json:
        facts = {"model": loaded.config.name_or_path, "device": str(on), "dtype": str(loaded.dtype), "budget": entries}
        print_json({**facts, "seed": seed, "runs": [run.summary() for run in runs]})
    else:
        results().print(_tables(runs))


def read_questions(path: Path) -> list[Question]:
    """All lines of a task file."""
    if not path.is_file():
        fail(f"--tasks {path}: no such file", "give a FILE.jsonl or FILE.jsonl.gz as models/tasks/README.md describes")
    names = Question.__dataclass_fields__
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = [json.loads(line) for line in data.split(b"\n") if line.strip()]
        return [Question(**{name: row[name] for name in names}) for row in rows]
    except (EOFError, KeyError, TypeError, ValueError, OSError) as error:
        fail(f"--tasks {path} is no task file: {error!r}", f"each line is a JSON object with {', '.join(names)}")


def pick(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """So many questions about needles (of any kind, if the file has none), the tasks in turn; 0: all of the file."""
    if not questions:
        fail("the task file is empty", "give one with at least one question")
    if count == 0:
        return list(questions)
    needles = [question for question in questions if question.task in _NEEDLES] or list(questions)
    random.Random(seed).shuffle(needles)
    by_task: dict[str, list[Question]] = {}
    for question in needles:
        by_task.setdefault(question.task, []).append(question)
    turn = {id(question): place for group in by_task.values() for place, question in enumerate(group)}
    return sorted(needles, key=lambda question: (turn[id(question)], question.task))[:count]


def ask(model: Any, tokenizer: Any, question: Question, method: Any) -> tuple[Answer, list[Any]]:
    """Compresses context and question, then feeds the answer prefix and decodes greedily, as the tasks' page says.

    Returns the answer, and the kept positions of each layer.
    """
    from kvcompress.models import CompressedCache, attach, cache_argument

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def step(ids: list[int]) -> int:
        given = {"input_ids": torch.tensor([ids], device=model.device), cache_argument(model): cache}
        output = model(**given, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    prompt = [tokenizer.bos_token_id, *encode(question.context), *encode(question.question)]
    expected = encode(f" {question.answer}\n")
    given: list[int] = []
    cache: Any = CompressedCache(model.config, method)
    with attach(model):
        started = time.perf_counter()
        step(prompt)
        prefilled = time.perf_counter()
        stats = cache.stats()
        positions = [cache.positions(layer.layer)[0].tolist() for layer in stats.layers]
        prefix = encode(question.answer_prefix)
        decoding = time.perf_counter()
        for token in prefix:
            following = step([token])
        while True:
            given.append(following)
            if following == expected[-1] or len(given) == _MOST_TOKENS:
                break
            following = step([following])
        ended = time.perf_counter()
    answer = Answer(
        task=question.task,
        expected=question.answer,
        given=tokenizer.decode(given).strip(),
        right=given == expected,
        prompt_tokens=len(prompt),
        logical_tokens=stats.logical_tokens,
        kv_bytes=stats.nbytes,
        kv_entries_per_layer=per_layer(stats),
        prefill_s=prefilled - started,
        decode_s=ended - decoding,
        steps=len(prefix) + len(given) - 1,
    )
    return answer, positions


def _settings(words: str, given: Sequence[str]) -> list[str]:
    """The settings that apply to this method, and the demo's own window where none was given."""
    own = choose.parameters(words)
    applied = [text for text in given if text.partition("=")[0] in own]
    if "window" in own and not any(text.startswith("window=") for text in applied):
        applied.append(f"window={_WINDOW}")
    return applied


def _where(tokenizer: Any, question: Question) -> int | None:
    """The token at which the answer stands in the context, if it stands there literally."""
    place = question.context.find(question.answer)
    if place < 0:
        return None
    return 1 + len(tokenizer(question.context[:place], add_special_tokens=False)["input_ids"])


def _tables(runs: Sequence[Run]) -> Group:
    summaries = [run.summary() for run in runs]
    full = summaries[0]
    highest = max((max(s["kv_entries_per_layer"]) for s in summaries[1:]), default=full["logical_tokens"])
    table = Table(
        title=f"questions: {full['questions']}, each on a document of about {full['logical_tokens']} tokens",
        caption=f"A bar a layer; a full one is {highest} entries or more. Bytes include the room for new tokens.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 1, 0),
    )
    for heading in ("method", "kept", "KV cache", "prefill", "decode", "right"):
        table.add_column(heading, no_wrap=True)
    for s in summaries:
        kept = s["kv_entries_per_layer"]
        table.add_row(
            s["method"].replace("+", "\n  + "),
            f"{bars(kept, highest)}\n{span(kept)}",
            f"{size(s['kv_bytes'])}\n{s['kv_bytes'] / full['kv_bytes']:.0%}",
            f"{s['prefill_s']:.2f} s",
            f"{1000 * s['decode_s_per_token']:.0f} ms/token",
            f"{s['correct']} of {s['questions']}",
        )
    answers = Table("asked for", title="answers", box=box.SIMPLE_HEAD)
    for run in runs:
        answers.add_column(run.method.replace("+", "\n  + "), overflow="fold")
    for row in zip(*(run.answers for run in runs)):
        answers.add_row(row[0].expected, *(_marked(answer) for answer in row))
    return Group(table, answers)


def _marked(answer: Answer) -> Text:
    return Text(f"{answer.given} {'✓' if answer.right else '✗'}", style="green" if answer.right else "red")
