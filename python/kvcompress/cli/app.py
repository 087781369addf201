"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

import kvcompress
from kvcompress.cli.bench import bench
from kvcompress.cli.calibrate import calibrate
from kvcompress.cli.demo import demo
from kvcompress.cli.doctor import doctor
from kvcompress.cli.eval import evaluate
from kvcompress.cli.generate import generate
from kvcompress.cli.inspect import inspect
from kvcompress.cli.methods import methods
from kvcompress.cli.tune import tune

__all__ = ["app"]

_HELP = """
Shrink the KV cache of a transformer LLM: score its entries, keep the best, free the rest.

[bold]Three things to try[/]

  A 4k-token document, answered with the full cache and with a tenth of it:

    [cyan]kvcompress demo[/]

  Any causal LM that transformers loads, its answer streamed from a cache cut to 1024 entries:

    [cyan]kvcompress generate --model PATH --method snapkv --budget 1024 --prompt-file book.txt[/]

  What there is, and what this machine lacks:

    [cyan]kvcompress methods[/]
    [cyan]kvcompress doctor[/]
"""

app = typer.Typer(
    help=_HELP, no_args_is_help=True, rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False
)
for command in (demo, generate, methods, inspect, tune, calibrate, doctor):
    app.command()(command)
app.command("eval")(evaluate)
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command(context_settings=_PASSED_ON)(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(kvcompress.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...
