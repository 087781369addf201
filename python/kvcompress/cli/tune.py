"""`kvcompress tune`: the smallest cache that keeps the loss under a bound, found on calibration questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvcompress.cli import choose
from kvcompress.cli.console import fail, notes, print_json, print_whole, results
from kvcompress.cli.eval import pick_samples
from kvcompress.cli.report import size

__all__ = ["tune"]

# One of each kind of score, splits of the best of them over layers and heads, and the one list over both.
_METHODS = (
    "snapkv:window=16,keydiff,tova,h2o,expected_attention,pyramidkv:window=16,squeeze_attention+snapkv:window=16,"
    "zigzagkv+snapkv:window=16,adakv+snapkv:window=16,auto,streaming_llm:rolling=False"
)


def tune(
    max_loss: Annotated[float, typer.Option(help="Bound: accuracy lost (0.01 is one point), or KL in nats.")],
    model: Annotated[str | None, typer.Option(help="Folder with config.json, or a hub id; kvc-mini if none.")] = None,
    metric: Annotated[
        Literal["accuracy", "kl"], typer.Option(help="What is bounded: lost accuracy, or KL(full || compressed).")
    ] = "accuracy",
    methods: Annotated[
        str, typer.Option(help="Comma-separated, see eval; A+B and pyramids split over the layers.")
    ] = _METHODS,
    tasks: Annotated[
        str | None, typer.Option(help="Calibration: FILE.jsonl[.gz], text:FILE (for --metric kl), tasks by name.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Comma-separated tokens; 2048 if none is given.")] = None,
    visible: Annotated[bool, typer.Option("--question-visible", help="Compress context and question.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most questions a task and length.")] = 8,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Most questions worked on together; what suits the device if none is given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the generated questions.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto: the checkpoint's, float32 on the CPU.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the winner: generate --method FILE.json takes it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
) -> None:
    """Find the smallest cache under a loss bound, over methods, budgets and layer splits."""
    if not 0 <= max_loss < float("inf"):
        fail(f"--max-loss {max_loss} is not a bound: it must be 0 or more", "give one like 0.01")
    if out is not None and out.suffix != ".json":
        fail(
            f"--out {out} does not end in .json", "profiles are known by that ending, as in generate --method FILE.json"
        )
    if out is not None:
        choose.writable(out, "--out")
    names = choose.named(methods, "--methods")
    made = {name: _make(name, 0.5) for name in names}
    on = choose.device(device)
    path = model or str(choose.bundled("kvc-mini", "--model"))
    loaded, tokenizer = choose.load_model(path, on, dtype)
    choose.fits(loaded, made, "--methods")
    samples = pick_samples(tasks, lengths, tokenizer, limit=limit, seed=seed, bundled_model=model is None, model=loaded)

    from kvcompress.evaluate.tune import pareto
    from kvcompress.evaluate.tune import tune as search

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with choose.refused(), Progress(*columns, console=notes(), transient=True) as progress:
        bar = progress.add_task("round 1", total=None)
        rounds = iter(range(1, 100))

        def on_round(total: int) -> None:
            progress.reset(bar, total=total, description=f"round {next(rounds)}")

        best, points = search(
            loaded, tokenizer, samples, _make, names, max_loss=max_loss, metric=metric, question_visible=visible,
            batch=batch, on_round=on_round, on_step=lambda n: progress.advance(bar, n),
        )  # fmt: skip
    front = pareto(points)
    if metric == "accuracy" and points[0].accuracy == 0:
        notes().print(
            "The full cache answers none of these questions right, so no accuracy can be lost and any cache is under the bound; "
            "--metric kl bounds how far the model's own words change.",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    about = {
        "model": path,
        "metric": metric,
        "max_loss": max_loss,
        "question_visible": visible,
        "questions": len(samples),
    }
    if best is not None and best.method is not None and out is not None:
        from kvcompress.methods import save_profile

        save_profile(out, best.method, **about, found=_plain(best), pareto=[_plain(point) for point in front])
    if as_json:
        found = None if best is None else _plain(best)
        shown = {"found": found, "pareto": [_plain(p) for p in front], "points": [_plain(p) for p in points]}
        print_json({**about, "profile": str(out) if out and best else None, **shown})
    else:
        print_whole(_table(points, front, best, metric, visible))
        if best is None:
            results().print(f"No cache is under the bound of {max_loss}; the full one is the answer.", highlight=False)
        elif out is not None:
            results().print(f"{out}: kvcompress generate --method {out} ...", highlight=False)
    if best is None:
        raise typer.Exit(1)


def _make(name: str, share: float) -> Any:
    words, *settings = name.split(":")
    if words == "full":
        fail("full is what the others are compared with", "leave it out of --methods")
    return choose.method(words, share, settings, "--methods")


def _plain(point: Any) -> dict[str, Any]:
    names = ("name", "budget", "loss", "accuracy", "low", "high", "kept", "bytes", "n")
    return {**{name: getattr(point, name) for name in names}, "parameters": str(point.method or "")}


def _table(points: Any, front: Any, best: Any, metric: str, visible: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.title = f"question {'visible' if visible else 'hidden'}: all points, smallest first; * is on the Pareto front"
    table.caption = "The bound holds on the calibration questions; the interval says how far these can tell."
    for heading in ("", "method", "budget", "bytes", "kept", f"loss ({metric})", "accuracy", "95 %"):
        table.add_column(heading, justify="left" if heading in ("", "method") else "right")
    for p in sorted(points, key=lambda p: (p.bytes, p.loss)):
        mark = "→" if p is best else ("*" if p in front else "")
        table.add_row(
            mark, p.name, f"{p.budget}", size(p.bytes), f"{100 * p.kept:.1f} %", f"{p.loss:.4f}", f"{100 * p.accuracy:.1f}",
            f"{100 * p.low:.0f} – {100 * p.high:.0f}", style="bold" if p is best else None,
        )  # fmt: skip
    return table
