"""Pictures of what a cache kept. Only this file imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kvcompress.cli.console import fail

__all__ = ["draw", "require_matplotlib"]


def require_matplotlib() -> None:
    """Ends the command early, before any work is done, where the picture could not be drawn."""
    if find_spec("matplotlib") is None:
        fail("--plot needs matplotlib", "pip install 'kvcompress[plots]'")


def draw(path: Path, kept: Mapping[str, Sequence[Sequence[Sequence[int]]]], tokens: int, needle: int | None) -> None:
    """One panel a method, one line a layer, position by position; the darker, the more heads keep it.

    Args:
        path: the file to write; its ending names the format.
        kept: for each method, ``[layer][head][entry]`` positions, -1 for none.
        tokens: length of the prompt.
        needle: position of what was asked for, marked below the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 2.1 * len(kept)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(kept), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (method, layers) in zip(panels, kept.items()):
        columns = min(tokens, 1024)  # more than the picture has pixels would fall through the raster
        share = np.zeros((len(layers), columns))
        for layer, heads in enumerate(layers):
            for head in heads:
                places = {position * columns // tokens for position in head if 0 <= position < tokens}
                share[layer, list(places)] += 1 / len(heads)
        panel.imshow(
            share, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1,
            extent=(0, tokens, len(layers) - 0.5, -0.5),
        )  # fmt: skip
        entries = sum(position >= 0 for heads in layers for head in heads for position in head)
        whole = tokens * sum(len(heads) for heads in layers)
        panel.set_title(f"{method}: {entries / whole:.0%} of the entries", loc="left", fontsize=10)
        panel.set_ylabel("layer")
        if needle is not None:
            panel.axvline(needle, color="tab:red", linewidth=0.8, linestyle=":")
    panels[-1].set_xlabel("position in the prompt" + ("" if needle is None else " (red: what was asked for)"))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        fail(f"--plot {path} could not be written: {error}", "give a file ending in .png in a folder that exists")
