"""`kvcompress inspect`: where a method hurts, layer by head, and which positions it kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvcompress.cli import choose
from kvcompress.cli.console import fail, print_json, print_whole
from kvcompress.cli.eval import pick_samples
from kvcompress.cli.report import size

__all__ = ["inspect"]

_COLUMNS = 64  # of the map of kept positions


def inspect(
    methods: Annotated[
        str, typer.Option(help="Comma-separated; A+B runs B inside A; snapkv:window=16 sets parameters.")
    ],
    budget: Annotated[
        str, typer.Option(help="Entries a head keeps in each layer (400), or their share (0.1).")
    ] = "0.1",
    model: Annotated[str | None, typer.Option(help="Folder with config.json, or a hub id; kvc-mini if none.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text; its last --next tokens are the queries that follow the prompt.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Otherwise the first question of this task, hidden (see eval).")
    ] = None,
    length: Annotated[int, typer.Option(min=64, help="Tokens of that question.")] = 2048,
    following: Annotated[int, typer.Option("--next", min=1, help="Next tokens whose queries are compared.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto: the checkpoint's, float32 on the CPU.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw the kept positions of each layer: FILE.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
) -> None:
    """Draw the attention's output error, layer x head, and the kept positions. No task, no answer: a second's look."""
    if plot is not None:
        from kvcompress.cli.plot import require_plot

        require_plot(plot)
    if prompt_file is not None and task is not None:
        fail("the prompt is given once", "give either --prompt-file FILE or --task NAME")
    entries = choose.parse_budget(budget)
    chosen: dict[str, Any] = {}
    for words in choose.named(methods, "--methods"):
        name, *settings = words.split(":")
        chosen[words] = choose.method(name, entries, settings, "--methods")
    on = choose.device(device)
    loaded, tokenizer = choose.load_model(model or str(choose.bundled("kvc-mini", "--model")), on, dtype)
    choose.fits(loaded, chosen, "--methods")
    ids, behind = _prompt(loaded, tokenizer, prompt_file, task, length, following, bundled=model is None)

    from kvcompress.evaluate.fidelity import attention_error
    from kvcompress.evaluate.reading import Reading
    from kvcompress.models import attach

    with choose.refused(), attach(loaded), torch.inference_mode():
        reading = Reading(loaded, ids, [m for m in chosen.values() if m is not None], queries=len(behind))
        caches = [reading.compress(method) for method in chosen.values()]
        errors = attention_error(reading, caches, behind).cpu()
    runs = []
    for (words, method), cache, error in zip(chosen.items(), caches, errors):
        stats = cache.stats()
        runs.append(
            {
                "method": words,
                "parameters": "" if method is None else str(method),
                "budget": entries,
                "error": [[round(value, 6) for value in row] for row in error.tolist()],
                "mean_error": error.mean().item(),
                "layers": [layer.layer for layer in stats.layers],
                "entries": [sum(layer.entries) / len(layer.entries) for layer in stats.layers],
                "bytes": stats.nbytes,
                "scorer": stats.layers[0].scorer,
                "positions": [cache.positions(layer.layer)[0].tolist() for layer in stats.layers],
            }
        )
    if plot is not None:
        from kvcompress.cli.plot import draw

        draw(plot, {run["method"]: run["positions"] for run in runs}, len(ids), None)
    if as_json:
        visible = None if prompt_file is not None else False
        print_json({"prompt_tokens": len(ids), "next_tokens": len(behind), "question_visible": visible, "runs": runs})
    else:
        about = f"the next tokens of {prompt_file}" if prompt_file is not None else "question hidden"
        print_whole(Group(*(_picture(run, len(ids), about) for run in runs)))


def _prompt(
    model: Any, tokenizer: Any, file: Path | None, task: str | None, length: int, following: int, *, bundled: bool
) -> tuple[list[int], list[int]]:
    """The tokens that are compressed, and those that follow."""
    if file is None:
        from kvcompress.evaluate.tasks import encode

        sample = pick_samples(
            task or "niah_multikey", str(length), tokenizer, limit=1, seed=0, bundled_model=bundled, model=model
        )[0]
        tokens = encode(sample, tokenizer)
        return tokens.context, [*tokens.question, *tokens.forced][:following]
    ids = tokenizer(choose.read_text(file, "--prompt-file"))["input_ids"]
    if len(ids) <= following + 1:
        fail(f"--prompt-file {file} has {len(ids)} tokens", f"give more than the {following} of --next")
    choose.takes(model, tokenizer, [ids], f"--prompt-file {file}")
    return ids[:-following], ids[-following:]


def _picture(run: dict[str, Any], tokens: int, about: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{run['parameters'] or run['method']}: {size(run['bytes'])}", title_justify="left"
    )
    table.caption = (
        f"error: |A - A'| / |A| of each query head's output, 0 green to 1 red; {about}; scorer: {run['scorer']}"
    )
    for heading in ("layer", "entries", "error of each head", "mean", f"kept positions, 0 to {tokens}"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("layer", "entries", "mean") else "left")
    for layer, error, entries, positions in zip(run["layers"], run["error"], run["entries"], run["positions"]):
        cells = Text()
        for value in error:
            cells.append(f"{value:4.2f}", style=f"black on {_colour(value)}")
            cells.append(" ")
        table.add_row(str(layer), f"{entries:.0f}", cells, f"{sum(error) / len(error):.3f}", _kept(positions, tokens))
    return table


def _colour(value: float) -> str:
    share = min(max(value, 0.0), 1.0)
    return f"rgb({int(90 + 165 * min(1, 2 * share))},{int(90 + 165 * min(1, 2 - 2 * share))},90)"


def _kept(heads: list[list[int]], tokens: int) -> str:
    """How full each stretch of the prompt still is, over all heads: blank to a whole block."""
    bins = [0] * _COLUMNS
    for head in heads:
        for position in head:
            if 0 <= position < tokens:
                bins[position * _COLUMNS // tokens] += 1
    most = max(1.0, len(heads) * tokens / _COLUMNS)
    return "".join(" ▁▂▃▄▅▆▇█"[min(8, -int(-8 * count // most))] for count in bins)
