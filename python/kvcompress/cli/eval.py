"""`kvcompress eval`: what methods cost a model, in answers, entries, bytes and time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvcompress.cli import choose
from kvcompress.cli.console import fail, notes, print_json, print_whole
from kvcompress.cli.report import size

if TYPE_CHECKING:
    from kvcompress.evaluate import Candidate, Record, Sample

__all__ = ["candidates", "evaluate", "load_records", "pick_samples", "table"]

_LONG = 100  # tokens of question and answer from which on the table says what a cache held at the end
_ABOUT = """accuracy: mean over tasks with its interval over contexts; as full: the same first choice as the full cache.
question visible: the compressed prompt held the question, so a scorer could look for its answer; hidden: it did not.
Figures of the two kinds are not comparable. Bytes are K, V and positions as held; prefill includes compression."""
_OPENING = '{"model": '  # of every line of --out
_SHORTEST = 16  # tokens that are a context and a question at all
_BUNDLED = {2048: "tasks/shared_2048.jsonl.gz", 4096: "tasks/shared_4096.jsonl.gz"}


def evaluate(
    model: Annotated[str | None, typer.Option(help="Folder with config.json, or a hub id; kvc-mini if none.")] = None,
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated; A+B runs B inside A; snapkv:window=16 sets parameters; all: every one."),
    ] = "snapkv,streaming_llm",
    budgets: Annotated[
        str, typer.Option(help="Comma-separated: shares of the prompt (0.1) or entries (256).")
    ] = "0.05,0.1,0.25,0.5",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: FILE.jsonl[.gz], text:FILE, generators or bundled tasks by name, lm_eval:NAME."
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Comma-separated tokens; 2048 if none is given.")] = None,
    visible: Annotated[
        bool, typer.Option("--question-visible", help="Compress context and question (query-aware).")
    ] = False,
    hidden: Annotated[
        bool, typer.Option("--question-hidden", help="Compress the context alone, then ask (the default).")
    ] = False,
    both: Annotated[bool, typer.Option("--both", help="Both ways, side by side.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Most questions a task and length.")] = 24,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Of text:FILE: tokens of the continuation, at most half of the length.")
    ] = 128,
    lm_eval_tasks: Annotated[
        Path | None, typer.Option(help="Folder with own YAML tasks for lm_eval:NAME; needs kvcompress\\[eval].")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All questions of the files.")] = False,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Most questions worked on together; what suits the device if none is given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the generated questions.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto: the checkpoint's, float32 on the CPU.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="FILE.jsonl: one JSON line a question, method and mode.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --out holds already.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="FILE.png: accuracy over entries, and needle depth x length.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="RUN_A RUN_B: two files of --out, sample by sample; runs nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
) -> None:
    """Measure what methods cost a model: answers right, entries and bytes kept, times."""
    if plot is not None:
        from kvcompress.cli.plot import require_plot

        require_plot(plot)
    named = [] if tasks is None else choose.named(tasks, "--tasks")
    foreign = [word.removeprefix("lm_eval:") for word in named if word.startswith("lm_eval:")]
    if foreign:
        _require_lm_eval()
        named = [word for word in named if not word.startswith("lm_eval:")]
    if compare is not None:
        _compare(load_records(compare[0]), load_records(compare[1]), as_json)
        return
    if resume and out is None:
        fail("--resume needs --out FILE", "give the file that the first go wrote")
    if out is not None and out.exists() and not resume:
        fail(f"--out {out} exists", "add --resume to go on with it, or give another file")
    if out is not None:
        choose.writable(out, "--out")
    chosen = candidates(methods, budgets)
    modes = [True, False] if both or (visible and hidden) else [visible]
    on = choose.device(device)
    path = model or str(choose.bundled("kvc-mini", "--model"))
    loaded, tokenizer = choose.load_model(path, on, dtype)
    choose.fits(loaded, {c.name: c.method for c in chosen}, "--methods")
    most = None if every else limit
    asked = (
        pick_samples(
            ",".join(named),
            lengths,
            tokenizer,
            limit=most,
            seed=seed,
            bundled_model=model is None,
            answer=answer_tokens,
            model=loaded,
        )
        if named or not foreign
        else []
    )

    from kvcompress.evaluate import evaluate as run
    from kvcompress.evaluate.metrics import means, summarise

    of = {"model": path, "dtype": str(loaded.dtype).removeprefix("torch.")}
    held = load_records(out, mend=True, of=of) if resume and out is not None and out.exists() else []
    wanted = {(str(c), c.budget, s.id, mode) for c in chosen for s in asked for mode in modes}
    records = [r for r in held if r.key in wanted]
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    sink = None
    try:
        with choose.refused(), Progress(*columns, console=notes(), transient=True) as progress:
            bar = progress.add_task("asking", total=len(wanted))
            for record in run(
                loaded, tokenizer, asked, chosen, question_visible=modes, batch=batch,
                done={r.key for r in records}, on_step=lambda n: progress.advance(bar, n),
            ):  # fmt: skip
                records.append(record)
                if out is not None:
                    sink = sink or out.open("a")
                    sink.write(json.dumps({**of, **record.to_dict()}) + "\n")
                    sink.flush()
    finally:
        if sink is not None:
            sink.close()
    place = {key: i for i, key in enumerate((str(c), c.budget) for c in chosen)}
    records.sort(key=lambda r: (not r.question_visible, r.length, place[r.parameters, r.budget]))
    lines = means(records)
    others = _lm_eval(loaded, tokenizer, chosen, foreign, most, lm_eval_tasks, lengths) if foreign else []
    if plot is not None:
        from kvcompress.cli.plot import draw_quality

        draw_quality(plot, lines, records)
    if as_json:
        print_json(
            {
                **of,
                "device": str(on),
                "questions": len(asked),
                "wall_s": time.perf_counter() - started,
                "runs": summarise(records),
                "means": lines,
                **({"lm_eval": others} if foreign else {}),
            }
        )
    else:
        if lines:
            print_whole(table(lines))
        if others:
            print_whole(_foreign_table(others))


def candidates(words: str, budgets: str) -> list[Candidate]:
    """The full cache, and each method at each budget."""
    from kvcompress import methods as registry
    from kvcompress.evaluate import Candidate

    names = [
        other
        for name in choose.named(words, "--methods")
        for other in (list(registry.available()) if name == "all" else [name])
    ]
    given = [choose.parse_budget(text, "--budgets") for text in choose.named(budgets, "--budgets")]
    shares = {repr(share): share for share in given}.values()  # 1 entry and a share of 1.0 are two budgets
    out = [Candidate("full", None)]
    for name in dict.fromkeys(names):
        method, *settings = name.split(":")
        if method != "full":
            out += [Candidate(name, choose.method(method, share, settings, "--methods"), share) for share in shares]
    return out


def pick_samples(
    tasks: str | None, lengths: str | None, tokenizer: Any, *, limit: int | None, seed: int, bundled_model: bool,
    answer: int = 128, model: Any = None,
) -> list[Sample]:  # fmt: skip
    """The questions that the words name: files, texts, bundled tasks, generators. `model` is to take them."""
    from kvcompress.evaluate import generators, read_samples
    from kvcompress.evaluate.tasks import encode, first
    from kvcompress.evaluate.text import text_samples

    try:
        wanted = list(dict.fromkeys(int(text) for text in (lengths or "2048").split(",")))
    except ValueError:
        fail(f"--lengths {lengths} are not numbers", "give tokens, like 2048,4096")
    if min(wanted) < _SHORTEST:
        fail(f"--lengths {lengths}: {min(wanted)} tokens are too few", f"give at least {_SHORTEST}, like 2048,4096")
    sets = {n: choose.bundled(_BUNDLED[n], "--tasks FILE") for n in wanted if n in _BUNDLED} if bundled_model else {}
    own = {n: read_samples(path) for n, path in sets.items()}
    bundled = list(dict.fromkeys(sample.task for rows in own.values() for sample in rows))
    named = list(dict.fromkeys(choose.named(tasks, "--tasks"))) if tasks else (bundled or generators.available())
    out: list[Sample] = []
    for word in named:
        if word.startswith("text:"):
            if not Path(word[5:]).is_file():
                fail(f"--tasks {word}: no such file", "give text:FILE with a plain text file")
            for length in wanted:
                try:
                    out += text_samples(Path(word[5:]), tokenizer, length=length, count=limit or 24, answer=answer)
                except ValueError as error:
                    fail(f"--tasks {error}", "give a longer text, or smaller --lengths")
        elif word.endswith((".jsonl", ".jsonl.gz")):
            if not Path(word).is_file():
                fail(f"--tasks {word}: no such file", "give a FILE.jsonl or FILE.jsonl.gz as models/tasks describes")
            try:
                rows = read_samples(word)
            except ValueError as error:
                fail(f"--tasks {error}", "each line is a JSON object with context, question, answer_prefix and answer")
            if not rows:
                fail(f"--tasks {word} has no line", "each line is a JSON object, as models/tasks/README.md describes")
            own_lengths = sorted({sample.length for sample in rows})
            if lengths is not None and not set(own_lengths) & set(wanted):
                fail(
                    f"--tasks {word} has no question of --lengths {lengths}",
                    f"its lengths are {', '.join(map(str, own_lengths))}; without --lengths all are taken",
                )
            out += [sample for sample in rows if lengths is None or sample.length in wanted]
        elif word in bundled:
            out += [sample for rows in own.values() for sample in rows if sample.task == word]
            for length in set(wanted) - set(own):
                if word in generators.available():
                    out += generators.generate(word, tokenizer, length=length, count=limit or 24, seed=seed)
        elif word in generators.available():
            for length in wanted:
                try:
                    out += generators.generate(word, tokenizer, length=length, count=limit or 24, seed=seed)
                except ValueError as error:
                    fail(f"--tasks {word} --lengths {length}: {error}", "give a greater length")
        else:
            known = ", ".join([*bundled, *(name for name in generators.available() if name not in bundled)])
            fail(f"--tasks: no task is called {word!r}", f"choose among: {known}; or give FILE.jsonl[.gz] or text:FILE")
    seen: set[str] = set()
    twice = next((s.id for s in out if s.id in seen or seen.add(s.id)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        fail(f"--tasks: two questions have the id {twice!r}", "give every question an id of its own, or none")
    out = first(out, limit)
    if model is not None:
        told = (encode(sample, tokenizer) for sample in out)
        choose.takes(model, tokenizer, ([*t.context, *t.question, *t.forced[:-1]] for t in told), "--tasks")
    return out


def _require_lm_eval() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        fail("--tasks lm_eval:NAME needs lm-evaluation-harness", "pip install 'kvcompress[eval]'")


def _lm_eval(
    model: Any, tokenizer: Any, chosen: Sequence[Candidate], tasks: list[str], limit: int | None, folder: Path | None,
    lengths: str | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """lm-eval's figures for every candidate; what it logs goes to stderr."""
    import contextlib
    import sys

    from kvcompress.evaluate.harness import run_tasks

    found = []
    for candidate in chosen:
        with contextlib.redirect_stdout(sys.stderr):
            try:
                rows = run_tasks(
                    model, tokenizer, candidate.method, tasks, limit=limit, folder=None if folder is None else str(folder),
                    lengths=[int(text) for text in lengths.split(",")] if lengths else [],
                )  # fmt: skip
            except (KeyError, ValueError, NotImplementedError, ConnectionError) as error:
                fail(
                    f"lm_eval:{','.join(tasks)}: {error}",
                    "lm-eval downloads its data sets; `lm_eval ls tasks` lists them",
                )
        about = {"method": candidate.name, "parameters": str(candidate), "budget": candidate.budget}
        found += [{**about, "question_visible": True, **row} for row in rows]
    return found


def _foreign_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, title="lm-eval: prompt and question compressed together (question visible)")
    for heading in ("task", "method", "budget", "metric", "value", "stderr", "n", "entries", "bytes"):
        shown.add_column(heading, justify="left" if heading in ("task", "method", "metric") else "right")
    for row in sorted(rows, key=lambda row: (row["task"], row["metric"])):
        shown.add_row(
            row["task"], row["method"], "" if row["method"] == "full" else f"{row['budget']}", row["metric"],
            f"{row['value']:.4f}", "" if row["stderr"] is None else f"{row['stderr']:.4f}", str(row["n"]),
            f"{row['entries']:.0f} ({100 * row['kept']:.1f} %)", size(row["bytes"]),
        )  # fmt: skip
    return shown


def load_records(path: Path, *, mend: bool = False, of: Mapping[str, str] | None = None) -> list[Record]:
    """The lines that --out wrote, of this model and dtype if they are given.

    A last line that was cut off is left out; `mend` takes it out of the file as well.

    A cut line begins as all of them do; a file that ends without a newline but is none of ours stays as it is.
    """
    from kvcompress.evaluate import Record

    if not path.is_file():
        fail(f"{path}: no such file", "give a file that `kvcompress eval --out` wrote")
    records = []
    text = path.read_text(errors="replace")
    lines = text.split("\n")
    is_cut = lines[-1] != "" and (lines[-1].startswith(_OPENING) or _OPENING.startswith(lines[-1]))
    lines = lines if lines[-1] else lines[:-1]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            records.append(Record.from_dict(row))
        except (KeyError, TypeError, ValueError):
            if number < len(lines) or not is_cut:
                fail(f"{path}: line {number} is no record", "give a file that `kvcompress eval --out` wrote")
            continue
        if of is not None and any(row.get(name) != value for name, value in of.items()):
            was, now = (", ".join(str(x.get(name)) for name in of) for x in (row, of))
            fail(
                f"{path}: line {number} is of {was}, this run of {now}",
                "go on with the same model, or give another file",
            )
    if mend and lines and is_cut:
        path.write_text("".join(f"{line}\n" for line in lines[: len(records)]))
    return records


def table(lines: Sequence[Mapping[str, Any]]) -> Group:
    """Means over tasks, a table a length and mode, a line a method and budget."""
    long = any(line["end_entries"] - line["entries"] > _LONG for line in lines)
    kinds = dict.fromkeys((line["question_visible"], line["length"]) for line in lines)
    tables = []
    for visible, length in kinds:
        own = [line for line in lines if (line["question_visible"], line["length"]) == (visible, length)]
        shown = Table(box=box.SIMPLE_HEAD, title_justify="left")
        shown.title = (
            f"question {'visible' if visible else 'hidden'}, {own[0]['prompt_tokens']:.0f} tokens compressed, "
            f"{_count(own[0]['n'], 'question')}, {_count(own[0]['tasks'], 'task')}"
        )
        for heading in ("method", "budget", "accuracy, 95 %", "as full", "KL", *(("ppl", "at end") if long else ()), "entries",
                        "bytes", "prefill", "decode"):  # fmt: skip
            shown.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
        for line in own:
            prefill = None if line["prefill_s"] is None else line["prefill_s"] + (line["compress_s"] or 0)
            perplexity = f"{line['perplexity']:.2f}" if line["perplexity"] < 1e4 else f"{line['perplexity']:.0e}"
            shown.add_row(
                line["method"],
                "" if line["method"] == "full" else f"{line['budget']}",
                f"{100 * line['accuracy']:.1f}  {100 * line['low']:3.0f} – {100 * line['high']:3.0f}",
                f"{100 * line['agreement']:.1f}",
                f"{line['kl']:.3f}",
                *((perplexity, f"{line['end_entries']:.0f}") if long else ()),
                f"{line['entries']:.0f} ({100 * line['kept']:.1f} %)",
                size(line["bytes"]),
                "" if prefill is None else f"{prefill:.2f} s",
                "" if line["decode_s"] is None else f"{1000 * line['decode_s']:.1f} ms",
            )
        tables.append(shown)
    return Group(*tables, Text(_ABOUT, style="italic"))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _compare(a: Sequence[Record], b: Sequence[Record], as_json: bool) -> None:
    """Two files over the samples that both have: differences of accuracy, and how often they disagree."""
    from kvcompress.evaluate.metrics import paired

    lines = paired(a, b)
    if not lines:
        fail("the two files share no sample, budget and mode", "compare files of the same tasks and budgets")
    if as_json:
        print_json({"runs": lines})
        return
    shown = Table(box=box.SIMPLE_HEAD, title="B against A on the same samples")
    for heading in (
        "question",
        "tokens",
        "A",
        "B",
        "budget",
        "n",
        "A right",
        "B right",
        "B - A",
        "95 %",
        "gained",
        "lost",
    ):
        shown.add_column(heading, justify="right")
    for line in lines:
        shown.add_row(
            "visible" if line["question_visible"] else "hidden",
            str(line["length"]),
            line["a"],
            line["b"],
            str(line["budget"]),
            str(line["n"]),
            f"{100 * line['a_accuracy']:.1f}",
            f"{100 * line['b_accuracy']:.1f}",
            f"{100 * line['difference']:+.1f}",
            f"{100 * line['low']:+.1f} … {100 * line['high']:+.1f}",
            str(line["gained"]),
            str(line["lost"]),
        )
    print_whole(shown)
