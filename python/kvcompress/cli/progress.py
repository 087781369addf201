"""A bar for long prompts, counted in decoder layers, which works for any model and any chunking."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from kvcompress.cli.console import notes

__all__ = ["prefill_bar"]


@contextmanager
def prefill_bar(model: Any, chunks: int, shown: bool) -> Iterator[None]:
    """Shows the prefill's progress on stderr, while it lasts; the bar goes when all layers have seen all chunks."""
    layers = _decoder_layers(model)
    if not shown or not layers:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=notes(), transient=True)
    task = progress.add_task("reading the prompt", total=len(layers) * chunks)

    def advance(*_: Any) -> None:
        progress.advance(task)
        if progress.finished:
            progress.stop()

    hooks = [layer.register_forward_hook(advance) for layer in layers]
    progress.start()
    try:
        yield
    finally:
        progress.stop()
        for hook in hooks:
            hook.remove()


def _decoder_layers(model: Any) -> list[nn.Module]:
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return list(module)
    return []
