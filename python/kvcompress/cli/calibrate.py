"""`kvcompress calibrate`: what a method measures once for a model, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvcompress.cli import choose
from kvcompress.cli.console import fail, notes, print_json, results
from kvcompress.cli.eval import pick_samples

__all__ = ["calibrate"]

_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)


def calibrate(
    method: Annotated[
        Literal["baklava_like", "compactor"],
        typer.Option(
            help="baklava_like: budgets a layer and kv head. compactor: a curve from a context's likelihood to the share it needs."
        ),
    ],
    out: Annotated[Path, typer.Option(help="FILE.json to write.")],
    model: Annotated[str | None, typer.Option(help="Folder with config.json, or a hub id; kvc-mini if none.")] = None,
    budget: Annotated[
        str, typer.Option(help="baklava_like: mean entries a cache the table is tuned at, like 0.1 or 1024.")
    ] = "0.1",
    tasks: Annotated[
        str | None,
        typer.Option(help="What is read: text:FILE, FILE.jsonl[.gz], tasks by name; the bundled ones with kvc-mini."),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Comma-separated tokens; 2048 if none is given.")] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="baklava_like: contexts that are profiled; others decide gamma and beta.")
    ] = 8,
    limit: Annotated[int, typer.Option(min=1, help="Most questions a task and length.")] = 4,
    layer_factor: Annotated[
        bool,
        typer.Option("--layer-factor", help="baklava_like: weigh a layer by how much it turns the residual stream."),
    ] = False,
    inner: Annotated[str, typer.Option(help="baklava_like: the method that ranks inside a cache.")] = "snapkv",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="compactor: key=value of the method; may be given again.")
    ] = None,
    caution: Annotated[
        float, typer.Option(min=1, help="compactor: how much more a too good prediction counts than a too bad one.")
    ] = 3.0,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Most questions worked on together; what suits the device if none is given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of generated questions.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto: the checkpoint's, float32 on the CPU.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
) -> None:
    """Measure once for a model what a method then uses for every prompt, and save it.

    [bold]Budgets of each layer and kv head[/], from how much every head changes its input; then used by path:

      [cyan]kvcompress calibrate --method baklava_like --budget 0.1 --out table.json[/]
      [cyan]kvcompress generate --method baklava_like --budget 0.1 --set table=table.json --prompt-file book.txt[/]

    [bold]A quality curve[/] for kvcompress.calibrated.Calibrated: how much of this context may go?

      [cyan]kvcompress calibrate --method compactor --model PATH --tasks text:book.txt --out curve.json[/]
    """
    if out.suffix != ".json":
        fail(f"--out {out} does not end in .json", "give a name like table.json")
    choose.writable(out, "--out")
    share = choose.parse_budget(budget)
    if method == "compactor":
        choose.method("compactor", 0.5, settings or [])
    elif settings:
        fail(f"--set {settings[0]}: a table has no parameters to set", "leave it out, or choose --method compactor")
    else:
        choose.method("baklava_like", share, [f"inner={inner}"])
    on = choose.device(device)
    path = model or str(choose.bundled("kvc-mini", "--model"))
    loaded, tokenizer = choose.load_model(path, on, dtype)
    samples = pick_samples(tasks, lengths, tokenizer, limit=limit, seed=seed, bundled_model=model is None, model=loaded)
    about = {"model": path, "revision": getattr(loaded.config, "_commit_hash", None), "questions": len(samples)}
    about["question_visible"] = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes(), transient=True) as progress:
        if method == "baklava_like":
            found = _table(loaded, tokenizer, samples, progress, prompts, share, inner, layer_factor, batch, out, about)
        else:
            found = _curve(loaded, tokenizer, samples, progress, settings or [], caution, batch, out, about)
    if as_json:
        print_json({"method": method, **about, **found, "out": str(out)})
        return
    results().print(_shown(method, found))
    use = f"--method baklava_like --budget {budget} --set table={out}" if method == "baklava_like" else ""
    then = f"kvcompress generate {use} ..." if use else f"Calibrated(nll, *load_curve('{out}'), quality=0.95)"
    results().print(f"{out}: {then}", highlight=False, markup=False, soft_wrap=True)


def _table(
    model: Any, tokenizer: Any, samples: Any, progress: Progress, prompts: int, budget: int | float, inner: str,
    layer_factor: bool, batch: int | None, out: Path, about: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from kvcompress.evaluate.calibrate import BETAS, GAMMAS, contexts, halves, head_change, prompts_hash, search_table

    profiled, held_out = halves(samples, prompts)
    if not held_out:
        fail(
            f"--prompts {prompts}: these tasks have no context left to search gamma and beta on",
            "give fewer --prompts, a greater --limit, or more text",
        )
    read = contexts(profiled, tokenizer)
    bar = progress.add_task("profiling heads", total=len(read))
    change = head_change(model, read, on_step=lambda n: progress.advance(bar, n))
    importance = change.importance(layer_factor)
    total = len(held_out) * (1 + len(GAMMAS) * len(BETAS))
    bar = progress.add_task("searching gamma and beta", total=total)
    table, trials = search_table(
        model, tokenizer, held_out, importance, budget=budget, inner=inner, batch=batch,
        on_step=lambda n: progress.advance(bar, n),
    )  # fmt: skip
    uniform = next(trial for trial in trials if trial.gamma == 0)
    count = table.num_layers * table.num_kv_heads
    ratios = [[n / 10_000 for n in row] for row in table.budgets(10_000, 10_000 * count)]
    found = {
        "tuned_at": budget,
        "inner": inner,
        "layer_factor": layer_factor,
        "prompts": len(read),
        "prompts_sha256": prompts_hash(read),
        "nll": trials[0].nll,
        "nll_uniform": uniform.nll,
        "keep": ratios,
        "trials": [vars(trial) for trial in trials],
    }
    table.save(out, **about, **found)
    return {"gamma": table.gamma, "beta": table.beta, **found}


def _curve(
    model: Any, tokenizer: Any, samples: Any, progress: Progress, settings: list[str], caution: float, batch: int | None,
    out: Path, about: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from kvcompress.evaluate.calibrate import fit_curve, save_curve

    bar = progress.add_task("measuring quality", total=len(samples) * (1 + len(_SHARES)))

    def make(share: float) -> Any:
        return choose.method("compactor", share, settings)

    alpha, beta, triples = fit_curve(
        model, tokenizer, samples, make, _SHARES, caution=caution, batch=batch,
        on_step=lambda n: progress.advance(bar, n),
    )  # fmt: skip
    found = {"method": str(make(0.5)), "caution": caution, "triples": triples}
    save_curve(out, alpha, beta, **about, **found)
    return {"alpha": alpha, "beta": beta, **found}


def _shown(method: str, found: dict[str, Any]) -> Table:
    if method == "baklava_like":
        shown = Table(box=box.SIMPLE_HEAD, min_width=72, title="gamma and beta on held-out answers, likeliest first")
        shown.caption = "Question hidden. NLL: mean over the answers' tokens, in nats. gamma 0 is the uniform budget."
        for heading in ("gamma", "beta", "NLL"):
            shown.add_column(heading, justify="right")
        for trial in found["trials"]:
            shown.add_row(f"{trial['gamma']}", f"{trial['beta']}", f"{trial['nll']:.4f}")
        return shown
    from kvcompress.calibrated import calibrated_keep

    middle = sorted(nll for _, nll, _ in found["triples"])[len(found["triples"]) // 2]
    shown = Table(
        box=box.SIMPLE_HEAD,
        min_width=72,
        title=f"share to keep for a context of NLL {middle:.2f} nats, the median here",
    )
    shown.caption = f"Question hidden. b = {found['alpha']:.4g} * NLL + {found['beta']:.4g}, fitted to {len(found['triples'])} answers."
    for heading in ("quality", "share"):
        shown.add_column(heading, justify="right")
    for quality in (0.99, 0.95, 0.9, 0.8):
        share = calibrated_keep([middle], found["alpha"], found["beta"], quality)[0]
        shown.add_row(f"{quality}", f"{100 * share:.1f} %")
    return shown
