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
# The same for the table of ragged heads and attention sums.
HEADS = [
    ("decode_attention", "B1 8192 entries a head, 4 query heads"),
    ("observed_decode_attention_", "B1 8192 entries a head, 4 query heads, column sums"),
    ("decode_attention", "B8 8192 entries a head, 4 query heads"),
    ("observed_decode_attention_", "B8 8192 entries a head, 4 query heads, column sums"),
    ("observed_decode_attention_", "B8 32768 entries a head, 8 query heads, column sums"),
    ("column_sums, lse given", "B1 S8192 all queries"),
    ("column_sums, lse given", "B1 S32768 all queries"),
    ("column_sums", "B1 S32768 all queries"),
    ("column_sums, joint_change", "B1 S32768 all queries"),
    ("mass_count", "B1 S32768 32 heads"),
    ("head_counts", "B1 S32768 1024 a head"),
    ("head_counts", "B1 S131072 1024 a head"),
    ("topk_ragged", "B1 S32768 1024 a head on average"),
    ("topk_ragged", "B1 S131072 1024 a head on average"),
    ("compact_ragged_", "8 heads of mean 32768, k 8192, one head 1x"),
    ("compact_ragged_", "8 heads of mean 32768, k 8192, one head 10x"),
]
CLIFF = 2.0  # times the best shape of the same size from which on a shape counts as fallen off
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
        what = (
            "sweep"
            if args.sweep
            else "core"
            if args.core
            else args.method or "_".join(args.stage or []) or "_".join(args.op) or "all"
        )
        found.append(args.save / f"{slug(device, name)}_{what}.json")
    return found


def best_rate(row: dict, statistic: str) -> float:
    """Bytes a second in the best round: what else the machine does is no property of a shape."""
    return row["bytes_s"] * row[f"{statistic}_us"] / row["best_us"]


def spread(rows: Sequence[dict], statistic: str) -> list[dict]:
    """Of each op of a sweep: the best shape, and what the others cost beside it, each in its best round.

    `by_bytes` compares times a byte that memory must give or take, `by_floor` times over the floor: a shape with more
    query rows has more products and exponentials a byte, and its floor knows.
    """
    ours = [row for row in rows if row["variant"] == "kvcompress"]
    found = []
    for op in dict.fromkeys(row["op"] for row in ours):
        own = [row for row in ours if row["op"] == op]
        costs = {
            "by_bytes": {row["case"]: 1 / best_rate(row, statistic) for row in own},
            "by_floor": {row["case"]: row["best_us"] / row["floor_us"] for row in own},
        }
        entry: dict[str, object] = {
            "op": op,
            "shapes": len(own),
            "best_bytes_s": 1 / min(costs["by_bytes"].values()),
        }
        for name, cost in costs.items():
            least = min(cost.values())
            over = {case: round(value / least, 2) for case, value in cost.items() if value > CLIFF * least}
            entry[name] = {"worst": round(max(cost.values()) / least, 2), "over_2x": over}
        found.append(entry)
    return found


def spread_lines(figures: dict) -> list[str]:
    lines = []
    for entry in figures.get("sweep", []):
        lines.append(f"{entry['op']}: {entry['shapes']} shapes, the best at {entry['best_bytes_s'] / 1e9:.0f} GB/s")
        for name, what in (("by_bytes", "a byte"), ("by_floor", "beside the floor")):
            over = ", ".join(f"{case} {times}" for case, times in entry[name]["over_2x"].items())
            lines.append(f"  {what}: up to {entry[name]['worst']}x the best" + (f"; over 2x: {over}" if over else ""))
    return lines


def draw(figures: dict, path: Path) -> list[Path]:
    """One picture an op, beside the JSON file: time over seq_len, a panel for each other size, the floor as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if "sweep" in figures:
        return [draw_sweep(figures, path)]
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


def draw_sweep(figures: dict, path: Path) -> Path:
    """All ops of a sweep: GB/s of every shape, a panel a size that is varied, and half of the best shape's as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in figures["rows"] if row["variant"] == "kvcompress"]
    panels: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        panels.setdefault(row["op"], {}).setdefault(row["swept"], []).append(row)
    columns = max(len(own) for own in panels.values())
    figure = Figure(figsize=(3.6 * columns, 2.9 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, (op, own) in zip(figure.subplots(len(panels), columns, squeeze=False), panels.items()):
        best = max(best_rate(row, figures["statistic"]) for shapes in own.values() for row in shapes) / 1e9
        for panel in line[len(own) :]:
            panel.set_axis_off()
        for panel, (swept, shapes) in zip(line, own.items()):
            places, rates = range(len(shapes)), [best_rate(row, figures["statistic"]) / 1e9 for row in shapes]
            floors = [rate * row["best_us"] / row["floor_us"] for rate, row in zip(rates, shapes)]
            panel.bar(places, rates, color="C0")
            panel.plot(places, floors, "k_", label="floor")
            panel.axhline(best / CLIFF, color="C3", linewidth=1, linestyle="--", label="half of the best")
            panel.set_xticks(places, [str(row["value"]) for row in shapes], rotation=90, fontsize=6)
            panel.set_title(f"{op}: {swept}", fontsize=8)
            panel.tick_params(axis="y", labelsize=6)
        line[0].set_ylabel("GB/s", fontsize=8)
        line[0].legend(fontsize=6)
    figure.suptitle(f"{figures['device']}, best of {figures['rounds']} rounds, {figures['date']}")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=80)
    return picture


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
            f"{variant} {number(row[statistic])} ({row['times_ours']:.1f}x)"
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


def heads_table(figures: dict) -> str:
    """Every variant of ours in a line, beside the floor and the fastest of the others in the same run.

    An observed attention stands beside itself without the statistics.
    """
    statistic = figures["statistic"] + "_us"
    graph, unobserved = ", in a graph", ", not observed"
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for row in figures["rows"]:
        cases.setdefault((row["op"], row["case"]), {})[row["variant"]] = row
    lines = ["| op | case | us | in a graph, us | times the floor | best of the others, us (times ours) |"]
    lines.append("| --- | --- | ---: | ---: | ---: | --- |")
    for op, label in HEADS:
        own = cases[op, label]
        peers = [row for variant, row in own.items() if not variant.startswith("kvcompress")]
        for variant, row in own.items():
            if row in peers or variant.endswith((graph, unobserved)):
                continue
            captured = own.get(variant + graph)
            beside = [own[name] for name in (variant + unobserved, variant + unobserved + graph) if name in own]
            peer = min(peers + beside, key=lambda x: x[statistic], default=None)
            best = captured or row
            said = "" if peer is None else (
                f"{'not observed' if peer in beside else peer['variant']} {number(peer[statistic])} "
                f"({peer[statistic] / best[statistic]:.2f}x)"
            )  # fmt: skip
            name, _, form = OURS.get(op, op).partition(",")
            words = variant.removeprefix("kvcompress").lstrip(",. ")
            lines.append(
                f"| `{name}`{form} | {label}{f', {words}' if words else ''} | {number(row[statistic])} | "
                f"{number(captured[statistic]) if captured else ''} | {best['floor_ratio']:.2f} | {said} |"
            )
    where = f"{figures['device']}, torch {figures['torch']}, {figures['date']}"
    lines.append(f"\n{where}; median of {figures['rounds']} interleaved rounds, {figures['cache']} cache.")
    return "\n".join(lines) + "\n"


def number(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def long_table(figures: dict) -> str:
    """Long answers: share of tokens right with its interval, methods in lines, tasks and budgets in columns."""
    held = {(line["task"], line["method"], line["budget"]): line for line in figures["lines"]}
    tasks, methods = (list(dict.fromkeys(line[name] for line in figures["lines"])) for name in ("task", "method"))
    budgets = sorted({line["budget"] for line in figures["lines"]} - {None})
    lines = ["| task, with every entry | method | " + " | ".join(map(str, budgets)) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(budgets))

    def cell(line: dict | None) -> str:
        if line is None:
            return ""
        return f"{100 * line['right']:.1f} ({100 * line['low']:.1f} - {100 * line['high']:.1f})"

    for task in tasks:
        for method in (name for name in methods if name != "full"):
            own = [held.get((task, method, budget)) for budget in budgets]
            whole = f"`{task}`: {cell(held.get((task, 'full', None)))}"
            lines.append(f"| {whole} | `{method}` | " + " | ".join(map(cell, own)) + " |")
    some = figures["lines"][0]
    prompts = [round(held[task, "full", None]["prompt_tokens"]) for task in tasks]
    answers = [round(held[task, "full", None]["answer_tokens"]) for task in tasks]
    lines.append(
        f"\n{figures['device']}, torch {figures['torch']}, {figures['dtype']}; {some['n']} samples a task, prompts of "
        f"{_listed(prompts)} tokens and answers of {_listed(answers)} on the mean."
    )
    return "\n".join(lines) + "\n"


def decode_table(figures: dict) -> str:
    """Decode steps: ms a token of every cache, beside the dense one that evicts nothing."""
    lines = ["| cache | ms a token | of the dense one | kernels a token |", "| --- | --- | --- | --- |"]
    for row in figures["rows"]:
        kernels = f"{row['kernels']:,}" if row.get("kernels") else ""
        lines.append(f"| {row['cache']} | {row['ms']:.2f} | {row['ratio_to_dense']:.3f} | {kernels} |")
    lines.append(f"\n{figures['device']}, torch {figures['torch']}, transformers {figures['transformers']}.")
    return "\n".join(lines) + "\n"


def launched_table(figures: dict) -> str:
    """Steps that are launched one by one: ms a token on the mean, and of the median step."""
    lines = ["| cache | entries | ms a token | median step | transformers |", "| --- | --- | --- | --- | --- |"]
    for row in figures["rows"]:
        lines.append(
            f"| {row['cache']} | {row['entries']:,} | {row['ms']:.1f} | {row['median_ms']:.1f} | {row['transformers']} |"
        )
    lines += [f"\n{peer}: {why}." for peer, why in figures.get("absent", {}).items()]
    lines.append(
        f"\n{figures['device']}, torch {figures['torch']}, {figures['layers']} layers, a budget of {figures['budget']:,}."
    )
    return "\n".join(lines) + "\n"


def memory_table(figures: dict) -> str:
    """Bytes of a cache: after the prefill, at the worst end of a layer, and what the prefill peaks at beyond one without a cache."""
    lines = [
        "| cache | entries of a head, least to most | after the prefill | most at the end of a layer | at the peak | prefill s |"
    ]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")

    def mib(count: float) -> str:
        return f"{count / 2**20:,.0f}"

    for row in figures["results"]:
        least, most = row["least_and_most_a_head"]
        heads = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        peak = row["prefill_peak_bytes"] - row["prefill_peak_without_cache"]
        sizes = " | ".join(map(mib, (row["held_bytes"], row["most_held_at_a_layers_end"], peak)))
        lines.append(f"| `{row['run'].partition('(')[0]}` | {heads} | {sizes} | {row['prefill_s']:.2f} |")
    asked = figures["arguments"]
    lines.append(
        f"\n{figures['device']}, torch {figures['torch']}, {asked['layers']} layers, a prompt of {asked['seq_len']:,} tokens, "
        f"methods at {asked['budget']:.0%} of the entries; MiB, the peak beyond that of a prefill without a cache."
    )
    return "\n".join(lines) + "\n"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"


def board_tables(result: dict) -> str:
    """The board of the methods, by the program that measures it: that one is of the repository, not of a wheel."""
    from bench import quality

    return quality.tables(result)


TABLES = {
    "core": table, "long": long_table, "decode": decode_table, "launched": launched_table, "board": board_tables,
    "memory": memory_table, "heads": heads_table,
}  # fmt: skip
MARK = re.compile(rf"(<!-- ({'|'.join(TABLES)}): (\S+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def filled(text: str, root: Path) -> str:
    """A README with the tables between its marks, `<!-- core: FILE -->` and the others of `TABLES`, made from these files."""

    def table_of(mark: re.Match[str]) -> str:
        return mark[1] + TABLES[mark[2]](json.loads((root / mark[3]).read_text())) + mark[4]

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
