"""What all commands print through: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console

__all__ = ["fail", "notes", "print_json", "results"]


def results() -> Console:
    """Standard output, as it is now (tests replace it)."""
    return Console()


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
