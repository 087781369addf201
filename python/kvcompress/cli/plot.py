"""Pictures of what a cache kept. Only this file imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress.cli import choose
from kvcompress.cli.console import fail

__all__ = ["draw", "draw_quality", "require_plot"]


def require_plot(path: Path) -> None:
    """Ends the command early, before any work is done, where the picture could not be drawn."""
    if find_spec("matplotlib") is None:
        fail("--plot needs matplotlib", "pip install 'kvcompress[plots]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    choose.writable(path, "--plot")
    if path.suffix[1:] not in FigureCanvasAgg.get_supported_filetypes():
        fail(f"--plot {path} does not end like a picture", "give a name like kept.png, kept.svg or kept.pdf")


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
    _save(figure, path)


def draw_quality(path: Path, lines: Sequence[Mapping[str, Any]], records: Sequence[Any]) -> None:
    """Accuracy over entries kept, a panel a length and mode, a line a method; below, for each mode, by needle depth x length.

    Args:
        path: the file to write.
        lines: as `kvcompress.evaluate.metrics.means` gives them.
        records: the records behind them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(line["length"], line["question_visible"]) for line in lines}, key=lambda p: (not p[1], p[0]))
    located = [r for r in records if r.depth is not None]
    methods = list(dict.fromkeys(line["method"] for line in lines))
    rows = len(methods) if located else 0
    figure = Figure(figsize=(6.5 * len(panels), 5 + 1.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + rows, len(panels), height_ratios=[5, *[1.1] * rows])
    lengths = sorted({r.length for r in located})
    modes = {True: "question visible", False: "question hidden"}
    for column, (length, visible) in enumerate(panels):
        panel = figure.add_subplot(grid[0, column])
        mode = modes[visible]
        panel.set_title(f"{length} tokens, {mode}", fontsize=10)
        for place, method in enumerate(methods):
            own = [x for x in lines if (x["method"], x["length"], x["question_visible"]) == (method, length, visible)]
            own = sorted(own, key=lambda x: x["kept"])
            if method == "full":
                panel.axhline(100 * own[0]["accuracy"], color="black", linewidth=0.8, label="full")
                continue
            kept, mean = ([100 * x[name] for x in own] for name in ("kept", "accuracy"))
            panel.plot(kept, mean, marker="o", markersize=3, label=method, color=f"C{place % 10}",
                       linestyle=("-", "--", ":")[place // 10 % 3])  # fmt: skip
            low, high = ([100 * x[name] for x in own] for name in ("low", "high"))
            panel.fill_between(kept, low, high, alpha=0.1, color=f"C{place % 10}", linewidth=0)
        panel.set(xscale="log", xlabel="entries kept, %", ylabel="exact match, %", ylim=(0, 102))
        panel.set_xticks([2, 5, 10, 25, 50, 100], labels=["2", "5", "10", "25", "50", "100"], minor=False)
        panel.legend(fontsize=7)
    for visible, mode in modes.items():
        columns = [column for column, (_, v) in enumerate(panels) if v == visible]
        for row, method in enumerate(methods if located and columns else []):
            heat = figure.add_subplot(grid[1 + row, columns[0] : columns[-1] + 1])
            values = np.full((len(lengths), 10), np.nan)
            for i, tokens in enumerate(lengths):
                for bin_ in range(10):
                    hits = [
                        r.right
                        for r in located
                        if r.method == method and r.length == tokens and r.question_visible == visible
                        and min(9, int(10 * r.depth)) == bin_
                    ]  # fmt: skip
                    values[i, bin_] = np.mean(hits) if hits else np.nan
            heat.imshow(values, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1, extent=(0, 100, len(lengths) - 0.5, -0.5))
            heat.set_yticks(range(len(lengths)), labels=[str(n) for n in lengths], fontsize=7)
            heat.set_title(f"{method}, {mode}: tokens x depth of the answer, all budgets", fontsize=8, loc="left")
            heat.tick_params(labelsize=7)
            if row + 1 == rows:
                heat.set_xlabel("depth of the answer, %; green: all right, red: none, white: not asked", fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        fail(f"--plot {path} could not be written: {error}", "give a file in a folder that you may write to")
