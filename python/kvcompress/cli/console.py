"""What all commands print through: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console, RenderableType

__all__ = ["fail", "notes", "print_json", "print_whole", "results"]


def results() -> Console:
    """Standard output, as it is now (tests replace it)."""
    return Console()


def print_whole(shown: RenderableType) -> None:
    """Prints tables on stdout in all their width, however narrow the window is: columns that are cut off say nothing."""
    out = results()
    width, out.width = out.width, 1000
    out.width = max(width, out.measure(shown).maximum)
    out.print(shown)


def notes() -> Console:
    """Standard error: progress and remarks, so that stdout stays clean for pipes."""
    return Console(stderr=True)


def fail(what: str, do: str) -> NoReturn:
    """Ends the command with what went wrong and what to do next."""
    console = notes()
    console.print(f"[bold red]error[/]: {_plain(what)}", soft_wrap=True, highlight=False)
    console.print(f"  {_plain(do)}", soft_wrap=True, highlight=False)
    raise typer.Exit(2)


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(result, indent=2))


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
