"""From figures to what people read: plots of time over length, and the README's table. `python -m bench.report --help`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

# The rows of the README's table: op, and the cases that stand for it, where they were measured.
TABLE = {
    "cuda": [
        ("window_scores", "B1 S8192 W32 avg5"),
        ("window_scores", "B1 S32768 W64 avg5"),
        ("window_scores", "B1 S131072 W64 avg5"),
        ("window_scores", "B8 S32768 W64 avg5"),
        ("window_scores, lse given", "B1 S32768 W64 avg5"),
        ("window_scores, lse given", "B1 S131072 W64 avg5"),
        ("topk", "rows 8 S32768 k 1024"),
        ("topk", "rows 64 S131072 k 1024"),
        ("topk", "rows 64 S131072 k 32768"),
        ("topk", "rows 256 S32768 k 1024"),
        ("compact_, gather", "B1 S32768 k 1024"),
        ("compact_, gather", "B1 S32768 k 8192"),
        ("compact_, gather", "B8 S131072 k 32768"),
        ("cosine_importance", "B1 S32768 hidden 4096"),
        ("step", "B1 S32768 W64 k 1024"),
        ("step, lse given", "B1 S32768 W64 k 1024"),
        ("decode_attention", "B1 1024 entries a head, 4 query heads"),
        ("decode_attention", "B1 8192 entries a head, 4 query heads"),
        ("decode_attention", "B8 32768 entries a head, 4 query heads"),
        ("decode_attention", "B64 1024 entries a head, 4 query heads"),
    ],
    "cpu": [
        ("window_scores", "B1 S8192 W32 avg5"),
        ("window_scores", "B1 S8192 W64 avg5"),
        ("window_scores", "B1 S8192 W64 avg5 float32"),
        ("topk", "rows 8 S8192 k 1024"),
        ("topk", "rows 8 S32768 k 8192"),
        ("compact_, gather", "B1 S8192 k 2048"),
        ("cosine_importance", "B1 S8192 hidden 4096"),
        ("step", "B1 S8192 W64 k 1024"),
        ("decode_attention", "B1 8192 entries a head, 4 query heads"),
    ],
}
OURS = {"compact_, gather": "compact_"}  # which op the variant "kvcompress" is, where the case names two


def slug(device: torch.device, name: str) -> str:
    """h100, h200, cpu ...: what files of a device are called."""
    if device.type == "cpu":
        return "cpu"
    words = re.findall(r"[A-Za-z]*\d+[A-Za-z0-9]*", name)
    return words[0].lower() if words else re.sub(r"\W+", "_", name).lower()


def paths(args: argparse.Namespace, device: torch.device, name: str) -> list[Path]:
    """Where the figures go."""
    found = [args.json] if args.json else []
    if args.save:
        what = "core" if args.core else args.method or "_".join(args.stage or []) or args.op or "all"
        found.append(args.save / f"{slug(device, name)}_{what}.json")
    return found


def draw(figures: dict, path: Path) -> list[Path]:
    """One picture an op, beside the JSON file: time over seq_len, a panel for each other size, the floor as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    statistic = figures["statistic"] + "_us"
    rows = [row for row in figures["rows"] if "seq_len" in row]
    for op in dict.fromkeys(row["op"] for row in rows):
        panels: dict[str, list[dict]] = {}
        for row in rows:
            if row["op"] == op:
                label = re.sub(r"\bS\d+ ?", "", row["case"])
                quarter = row.get("k") == row["seq_len"] // 4
                panels.setdefault(re.sub(r"k \d+", "k S/4", label) if quarter else label, []).append(row)
        panels = {label: own for label, own in panels.items() if len({row["seq_len"] for row in own}) > 1}
        if not panels:
            continue
        columns = min(4, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for panel in grid.flat[len(panels) :]:
            panel.set_axis_off()
        for panel, (label, own) in zip(grid.flat, panels.items()):
            floor = sorted({(row["seq_len"], row["floor_us"]) for row in own})
            panel.plot(*zip(*floor), color="black", linewidth=1, linestyle="--", label="floor")
            for place, variant in enumerate(dict.fromkeys(row["variant"] for row in own)):
                points = sorted((row["seq_len"], row[statistic]) for row in own if row["variant"] == variant)
                is_ours = variant.startswith("kvcompress")
                panel.plot(*zip(*points), marker="o", markersize=3, linewidth=2 if is_ours else 1, label=variant,
                           color=f"C{place}")  # fmt: skip
            panel.set(xscale="log", yscale="log", xlabel="seq_len", ylabel="us", title=label)
            panel.set_xscale("log", base=2)
            panel.legend(fontsize=6)
        figure.suptitle(f"{op}: {figures['device']}, {figures['statistic']} of {figures['rounds']} rounds", fontsize=10)
        name = re.sub(r"\W+", "_", op).strip("_")
        picture = path.with_name(f"{path.stem}_{name}.png")
        figure.savefig(picture, dpi=90)
        written.append(picture)
    return written


def table(figures: dict) -> str:
    """The README's table: ours, its floor, and the fastest way to get the same from others."""
    kind = "cpu" if figures["statistic"] == "best" else "cuda"
    statistic = figures["statistic"] + "_us"
    graphs = kind == "cuda"
    lines = ["| op | case | us |" + " in a graph, us |" * graphs + " times the floor | others, us (times ours) |"]
    lines.append("| --- | --- | --- |" + " --- |" * graphs + " --- | --- |")
    for op, label in TABLE[kind]:
        own = {row["variant"]: row for row in figures["rows"] if (row["op"], row["case"]) == (op, label)}
        if "kvcompress" not in own:
            continue
        best = own["kvcompress"]
        graph = own.get("kvcompress, in a graph")
        others = [
            f"{variant} {number(row[statistic])} ({row[statistic] / best[statistic]:.1f}x)"
            for variant, row in own.items()
            if not variant.startswith("kvcompress")
        ]
        parts = [row for variant, row in own.items() if variant.startswith("kvcompress.") and "alone, in a" in variant]
        if graph and parts:
            others.append(f"its parts in graphs {number(sum(row[statistic] for row in parts))}")
        name, _, form = OURS.get(op, op).partition(",")
        lines.append(
            f"| `{name}`{form} | {label} | {number(best[statistic])} |"
            + f" {number(graph[statistic]) if graph else ''} |" * graphs
            + f" {best['floor_ratio']:.2f} | {', '.join(others)} |"
        )
    where = f"{figures['device']}, torch {figures['torch']}, {figures['date']}"
    how = "best" if kind == "cpu" else "median"
    lines.append(f"\n{where}; {how} of {figures['rounds']} interleaved rounds, {figures['cache']} cache.")
    return "\n".join(lines) + "\n"


def number(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


MARK = re.compile(r"(<!-- core: (\S+) -->\n).*?(<!-- /core -->)", re.DOTALL)


def filled(text: str, root: Path) -> str:
    """A README with the tables between its marks, `<!-- core: FILE -->`, made from these files."""

    def table_of(mark: re.Match[str]) -> str:
        return mark[1] + table(json.loads((root / mark[2]).read_text())) + mark[3]

    return MARK.sub(table_of, text)


def main(argv: Sequence[str] | None = None) -> None:
    form = argparse.ArgumentParser(description=__doc__)
    form.add_argument(
        "figures", type=Path, nargs="?", help="a JSON file that bench/run.py --core wrote: prints its table"
    )
    form.add_argument("--draw", action="store_true", help="draw its plots again instead")
    form.add_argument("--readme", type=Path, help="fill the marked tables of this file")
    args = form.parse_args(argv)
    if args.readme:
        args.readme.write_text(filled(args.readme.read_text(), args.readme.resolve().parent))
    if args.figures:
        figures = json.loads(args.figures.read_text())
        print("\n".join(map(str, draw(figures, args.figures))) if args.draw else table(figures), end="")


if __name__ == "__main__":
    main()
