"""`kvcompress methods`: the registry, for people, programs and the README."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer
from rich.table import Table

from kvcompress.cli.console import fail, print_json, results
from kvcompress.methods import available

__all__ = ["entries", "markdown", "methods"]


def methods(
    name: Annotated[str | None, typer.Argument(help="Only this one, with all its documentation.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README.")] = False,
) -> None:
    """List the methods: name, what it does, paper, parameters with their defaults."""
    if name is not None and name not in available():
        fail(f"no method is called {name!r}", f"choose among: {', '.join(available())}")
    if as_json:
        print_json({"methods": [entry for entry in entries() if name in (None, entry["name"])]})
    elif name is not None:
        results().print(inspect.getdoc(available()[name]), markup=False, highlight=False)
    elif as_markdown:
        typer.echo(markdown())
    else:
        table = Table(show_lines=True)
        for heading in ("method", "what it does", "paper", "parameters"):
            table.add_column(heading, overflow="fold")
        for entry in entries():
            table.add_row(entry["name"], entry["summary"], entry["paper"], "\n".join(_signature(entry)))
        results().print(table)
        results().print("Use: --method NAME --set parameter=value; A+B runs B inside A.", highlight=False)


def entries() -> list[dict[str, Any]]:
    """One record a method: name, title, summary, paper, parameters."""
    return [
        {
            "name": name,
            "title": cls.title,
            "summary": (cls.__doc__ or "").strip().splitlines()[0],
            "paper": cls.paper,
            "parameters": {field.name: _default(field) for field in fields(cls)},
        }
        for name, cls in available().items()
    ]


def markdown() -> str:
    """The README's table."""
    rows = ["| method | what it does | paper | parameters |", "| --- | --- | --- | --- |"]
    for entry in entries():
        parameters = ", ".join(f"`{text}`" for text in _signature(entry))
        rows.append(f"| `{entry['name']}` | {entry['summary']} | {entry['paper']} | {parameters} |")
    return "\n".join(rows)


def _default(field: Field[Any]) -> dict[str, Any]:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is MISSING:
        return {"required": True}
    plain = default is None or isinstance(default, (bool, int, float, str))
    return {"required": False, "default": default if plain else str(default)}


def _signature(entry: dict[str, Any]) -> list[str]:
    return [
        name if parameter["required"] else f"{name}={parameter['default']}"
        for name, parameter in entry["parameters"].items()
    ]
