"""The command line: `kvcompress --help` lists the commands. Only this room imports typer and rich."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of the `kvcompress` command."""
    try:
        from kvcompress.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        raise SystemExit(
            f"kvcompress: the command line needs {error.name}; install it with `pip install 'kvcompress[hf]'`"
        ) from None
    app()
