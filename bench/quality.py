"""The board: every method of the registry on kvc-mini, at four budgets, question visible and hidden, beside the peers' figures.

    python bench/quality.py          # all of it, on the GPU if there is one; writes bench/results/quality_kvc_mini.json and .png
    python bench/quality.py --table  # that file as the README's tables

It can be ended and started again: what was measured is kept in --records and skipped. Where a peer's figure for the same method
is above our interval, or is of another number of entries, it says so, and the file does (`behind_peers`).
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Literal

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
KEEP = (0.5, 0.25, 0.1, 0.05)
LIMITS = {1024: 24, 2048: 24, 4096: 12}  # first questions of each task: those of the peers' figures

# Which of our settings is the method that a peer's figure stands for (kvpress 0.5.5, its defaults).
PEERS = {
    "snapkv": "snapkv:window=64:kernel_size=5:pool=avg:window_reduce=mean",
    "snapkv_w16": "snapkv:window=16:kernel_size=5:pool=avg:window_reduce=mean",
    "pyramidkv": "pyramidkv:window=64:kernel_size=5:pool=avg:window_reduce=mean:allocation=kvpress",
    "tova": "tova:window=1",
    "keydiff": "keydiff",
    "knorm": "knorm:skip_layers=()",
    "expected": "expected_attention",
    "streaming": "streaming_llm:rolling=False",
    "random": "random",
    "lagkv": "lagkv",
    "adakv_snapkv": "adakv+snapkv:window=64:kernel_size=5:pool=avg:window_reduce=mean:floor=0.2:rounding=safeguard",
    "adakv_expected": "adakv+expected_attention:floor=0.2:rounding=safeguard",
    "kvzip": "kvzip",
}
# Beside the defaults: settings that suit this model's short questions, one of several methods together, and methods that cut the
# prompt by default, here evicting with every decoded token as well.
MORE = (
    "squeeze_attention+snapkv:window=16", "zigzagkv+snapkv:window=16", "chunkkv:window=16", "obcache:window=16",
    "adakv+keydiff", "keydiff:before_rope=True:window=32:sink=4", "auto:attention=0", "auto:lookahead=8",
    "h2o:decode=True", "tova:decode=True", "obcache:decode=True",
)  # fmt: skip
SECONDS = ("prefill_s", "compress_s", "decode_s")
TIMED_AT = 0.1  # the share at which methods are timed, by a process alone
# Tokens of prompts that a process takes at a time. On a GPU, reading, cuts and scores of so many take about 16 GiB.
TOKENS = {"cpu": 1 << 15, "cuda": 1 << 17}
GPU_PROCESS = 24 << 30  # bytes of the GPU's memory for each process


def board(words: str | None) -> list[str]:
    from kvcompress import methods

    known = methods.available()
    if words:
        return words.split(",")
    peers = [name for name in PEERS.values() if set(name.split(":")[0].split("+")) <= set(known)]
    return list(dict.fromkeys([*known, *peers, *MORE]))


_worker: dict = {}


def start(args: argparse.Namespace, threads: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvcompress.cli.eval import candidates

    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    _worker["model"] = model.to(args.device).eval()
    _worker["tokenizer"] = AutoTokenizer.from_pretrained(args.model)
    budgets = ",".join(str(keep) for keep in args.keep)
    _worker["candidates"] = candidates(",".join(board(args.methods)), budgets)


def work(job: tuple) -> list[dict]:
    from kvcompress.evaluate import evaluate

    samples, modes, done = job
    model, tokenizer, candidates = (_worker[name] for name in ("model", "tokenizer", "candidates"))
    found = evaluate(model, tokenizer, samples, candidates, question_visible=modes, done=done, timed=0)
    return [record.to_dict() for record in found]


def times(args: argparse.Namespace, samples: dict[int, list]) -> list[dict]:
    """Seconds of every method and length at `TIMED_AT`, in this process with nothing beside it; best of three, so the first may be slow."""
    import torch

    from kvcompress.evaluate import evaluate
    from kvcompress.evaluate.metrics import summarise

    start(argparse.Namespace(**{**vars(args), "keep": [TIMED_AT]}), args.threads or os.cpu_count() or 1)
    model, tokenizer, candidates = (_worker[name] for name in ("model", "tokenizer", "candidates"))
    rows = []
    for length, own in samples.items():
        few = [sample for sample in own if sample.task == own[0].task][:3]
        for run in summarise(evaluate(model, tokenizer, few, candidates, question_visible=[False], timed=3)):
            rows.append({"method": run["method"], "length": length, **{n: run[n] for n in SECONDS}})
    _worker.clear()
    if str(args.device).startswith("cuda"):
        torch.cuda.empty_cache()
    return rows


def jobs_of(groups: list, modes: tuple, done: set, tokens: int) -> list[tuple]:
    """Contexts with all their questions, put together up to so many tokens of prompts of one length; the long ones first."""
    parts: list[list] = []
    for group in sorted(groups, key=lambda group: -group[0].length):
        most = tokens // group[0].length
        fits = parts and parts[-1][0].length == group[0].length and len(parts[-1]) + len(group) <= most
        if fits:
            parts[-1].extend(group)
        else:
            parts.append(list(group))
    ids = [{sample.id for sample in part} for part in parts]
    return [(part, modes, {key for key in done if key[2] in own}) for part, own in zip(parts, ids)]


def read_records(path: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """What earlier goes have measured: records, times of methods, and what each go took up to its last part.

    What was cut off at the end is taken out of the file.
    """
    lines: list[str] = []
    rows: list[dict] = []
    is_cut = False
    if path.exists():
        with opened(path, "r") as source:
            try:
                lines.extend(source)
            except EOFError:  # the last member of a .gz
                is_cut = True
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
            is_cut = True
    if is_cut:
        with opened(path, "w") as sink:
            sink.writelines(json.dumps(row) + "\n" for row in rows)
    goes = {row["go"]["began"]: row["go"] for row in rows if "go" in row}  # the last word of each
    return (
        [row for row in rows if "id" in row],
        [row for row in rows if "compress_s" in row and "id" not in row],
        [*goes.values()],
    )


def opened(path: Path, mode: Literal["r", "w", "a"]) -> IO[str]:
    """A text file; a .gz one gets a member of its own each time it is written to."""
    if path.suffix != ".gz":
        return path.open(mode)
    return io.TextIOWrapper(gzip.GzipFile(path, mode))


def add(path: Path, rows: list[dict]) -> None:
    with opened(path, "a") as sink:
        sink.writelines(json.dumps(row) + "\n" for row in rows)


def measure(args: argparse.Namespace) -> dict:
    from kvcompress.evaluate import Record, read_samples
    from kvcompress.evaluate.metrics import means
    from kvcompress.evaluate.tasks import by_context, first

    started = time.perf_counter()
    held, known, _ = read_records(args.records)
    samples = {
        length: first(read_samples(args.tasks / f"shared_{length}.jsonl.gz"), args.limit or LIMITS[length])
        for length in args.lengths
    }
    groups = [group for own in samples.values() for group in by_context(own)]
    if args.contexts:
        groups = [groups[i * len(groups) // args.contexts] for i in range(args.contexts)]
    modes = {"both": (True, False), "visible": (True,), "hidden": (False,)}[args.question]
    done = {Record.from_dict(row).key for row in held}
    jobs = jobs_of(groups, modes, done, args.tokens or TOKENS[args.device.split(":")[0]])
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    go: dict = {"began": time.strftime("%Y-%m-%d %H:%M:%S"), "where": where(args), "records": 0}
    go |= {"timing_s": 0.0, "timing_cpu_s": 0.0}  # of it, to time each method alone

    def spent() -> tuple[float, float]:
        """Since it began: seconds, and seconds of a core in all processes that have ended."""
        return round(time.perf_counter() - started, 1), round(sum(os.times()[:4]), 1)

    def note(rows: list[dict], *, ended: bool = False) -> None:
        wall, cpu = spent()
        add(args.records, [*rows, {"go": {**go, "wall_s": wall, "cpu_s": cpu if ended else None}}])

    if not known and not args.no_times:
        known = times(args, samples)
        go["timing_s"], go["timing_cpu_s"] = spent()
        note(known)
    with multiprocessing.get_context("spawn").Pool(args.jobs, start, (args, threads)) as pool:
        for number, rows in enumerate(pool.imap_unordered(work, jobs), 1):
            go["records"] += len(rows)
            note(rows)
            print(f"{number}/{len(jobs)} parts, {time.perf_counter() - started:.0f} s", file=sys.stderr)
        pool.close()
        pool.join()
    if go["records"]:
        note([], ended=True)
    held, known, goes = read_records(args.records)
    ids = {sample.id for group in groups for sample in group}
    records = [record for record in map(Record.from_dict, held) if record.id in ids]
    seconds = {(row["method"], row["length"]): {n: row[n] for n in SECONDS} for row in known}
    result = {
        "what": about(args, samples, groups),
        "goes": goes,
        "wall_s": round(sum(go["wall_s"] for go in goes), 1),
        "lines": lines_of(means(records), records, seconds, board(args.methods)),
    }
    return {**result, "behind_peers": behind(result)}


def about(args: argparse.Namespace, samples: dict[int, list], groups: list) -> dict:
    """What was asked: enough to see whether two boards are of the same questions."""
    asked = {sample.id for group in groups for sample in group}
    counts = {str(length): sum(sample.id in asked for sample in own) for length, own in samples.items()}
    all_of = {str(length): len(own) for length, own in samples.items()}
    return {
        "model": Path(args.model).name,
        "questions": counts,
        "of": all_of,
        "contexts": len(groups),
        "keep": args.keep,
    }


def lines_of(lines: list[dict], records: list, seconds: dict, names: list[str]) -> list[dict]:
    """The means with their tasks and times, in the order of the board."""
    tasks: dict = {}
    for r in records:
        key = (r.method, r.budget, r.length, r.question_visible)
        tasks.setdefault(key, {}).setdefault(r.task, []).append(r.right)
    for line in lines:
        own = tasks[line["method"], line["budget"], line["length"], line["question_visible"]]
        line["tasks"] = {task: round(sum(right) / len(right), 4) for task, right in own.items()}
        if line["budget"] == (1.0 if line["method"] == "full" else TIMED_AT):
            line.update(seconds.get((line["method"], line["length"]), {}))
        for name, value in line.items():
            line[name] = round(value, 5) if isinstance(value, float) else value
    order = {name: place for place, name in enumerate(["full", *names])}
    return sorted(
        lines, key=lambda x: (x["length"], not x["question_visible"], order.get(x["method"], 99), -x["budget"])
    )


def where(args: argparse.Namespace) -> dict:
    import torch

    import kvcompress

    cuda = str(args.device).startswith("cuda")
    cores = f"{processor()}, {os.cpu_count()} cores"
    return {
        "device": torch.cuda.get_device_name() if cuda else cores,
        **({"host": cores} if cuda else {}),
        "processes": args.jobs,
        "kvcompress": kvcompress.__version__,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "dtype": "float32",
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The name of the CPU, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.machine()


def peers() -> list[dict]:
    path = RESULTS / "peers_kvc_mini.json"
    return json.loads(path.read_text())["lines"] if path.exists() else []


def table(result: dict, length: int) -> str:
    """Markdown: methods in lines, share of the entries kept in columns, visible and hidden; a peer's figure in brackets."""
    ours: dict = {}
    for line in result["lines"]:
        if line["length"] == length:
            ours.setdefault(line["method"], {})[line["question_visible"], line["budget"]] = line
    theirs = {(x["method"], x["question_visible"], x["keep"]): x["accuracy"] for x in peers() if x["length"] == length}
    named = {words: peer for peer, words in PEERS.items()}
    columns = [(visible, keep) for visible in (True, False) for keep in KEEP]
    heads = [f"{'visible' if visible else 'hidden'} {100 * keep:.0f} %" for visible, keep in columns]
    heads += ["compress, ms", "decode, ms"]
    rows = ["| method | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for method, cells in ours.items():
        shown = []
        for visible, keep in columns:
            line = cells.get((visible, 1.0 if method == "full" else keep))
            text = "" if line is None else f"{100 * line['accuracy']:.1f}"
            peer = theirs.get((named.get(method), visible, keep))
            shown.append(text if peer is None else f"{text} ({100 * peer:.1f})")
        timed = cells.get((False, 1.0 if method == "full" else TIMED_AT)) or {}
        shown += ["" if timed.get(n) is None else f"{1000 * timed[n]:.1f}" for n in ("compress_s", "decode_s")]
        name, *settings = method.split(":")
        rows.append(f"| `{name}`{' ' + ', '.join(settings) if settings else ''} | " + " | ".join(shown) + " |")
    for peer in dict.fromkeys(x["method"] for x in peers() if x["method"] not in ("full",)):
        if PEERS.get(peer) not in ours:
            cells = [theirs.get((peer, *column)) for column in columns]
            shown = ["" if cell is None else f"({100 * cell:.1f})" for cell in cells]
            rows.append(f"| {peer} of a peer | " + " | ".join(shown) + " | | |")
    return "\n".join(rows)


def tables(result: dict) -> str:
    """The README's part: a table a length, where they were made, and what a part of them took on a CPU."""
    parts = [f"{length} tokens:\n\n{table(result, int(length))}" for length in result["what"]["questions"]]
    part = RESULTS / "quality_cpu.json"
    return "\n\n".join([*parts, made(result), *([made(json.loads(part.read_text()))] if part.exists() else [])]) + "\n"


def made(result: dict) -> str:
    """Where a board was measured and how long that took; of a part of it, what all would take."""
    what, last = result["what"], result["goes"][-1]["where"]
    asked, total = sum(what["questions"].values()), sum(what["of"].values())
    methods = len({line["method"] for line in result["lines"]}) - 1 if "lines" in result else what["methods"]
    gone = []
    for go in result["goes"]:
        timing = f" ({go['timing_s']:,.0f} s of them to time each method alone)" if go.get("timing_s") else ""
        cores = f", {go['cpu_s']:,.0f} s of a core" if go.get("cpu_s") else ""
        spent = f"in {go['wall_s']:,.0f} s{timing}{cores}" if go["wall_s"] else "in a time that was not taken"
        where = f"{go['where']['processes']} processes on {go['where']['device']}"
        gone.append(f"{go['records']:,} answers {spent} ({where}{'; ' + go['note'] if 'note' in go else ''})")
    notes = [result["note"]] if "note" in result else []
    if asked < total and all(go.get("cpu_s") for go in result["goes"]):
        share = sum(go["cpu_s"] - go["timing_cpu_s"] for go in result["goes"]) * total / asked
        notes.append(f"all {total} questions would be about {share:,.0f} s of a core (scaled, not measured)")
    return (
        f"{methods} methods, {asked} of {total} questions: {'; '.join([', then '.join(gone), *notes])}. "
        f"torch {last['torch']}, {last['dtype']}, {last['date']}."
    )


# Lines of the picture: ours by its words, and the peers' best by their names.
DRAWN = {
    "auto": "C0", "keydiff": "C1", "snapkv:window=16:kernel_size=5:pool=avg:window_reduce=mean": "C2", "lava": "C3",
    "squeeze_attention+snapkv:window=16": "C4", "h2o": "C5", "streaming_llm:rolling=False": "C6", "random": "0.6",
}  # fmt: skip
DRAWN_PEERS = {"kvzip": "C7", "keydiff": "C1", "snapkv_w16": "C2", "adakv_snapkv": "C8"}


def draw(result: dict, path: Path) -> None:
    """Accuracy over the share of entries kept, a panel a length and mode; lines are ours, crosses are peers' figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [x for x in result["lines"] if x["method"] in (*DRAWN, "full")]
    panels = sorted({(x["length"], x["question_visible"]) for x in lines}, key=lambda p: (p[0], not p[1]))
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (length, visible) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        here = [x for x in lines if (x["length"], x["question_visible"]) == (length, visible)]
        panel.axhline(next(100 * x["accuracy"] for x in here if x["method"] == "full"), color="black", linewidth=0.8)
        for method, color in DRAWN.items():
            own = sorted((x for x in here if x["method"] == method), key=lambda x: x["kept"])
            kept = [100 * x["kept"] for x in own]
            panel.plot(
                kept,
                [100 * x["accuracy"] for x in own],
                color=color,
                marker="o",
                markersize=3,
                label=method.split(":")[0],
            )
            panel.fill_between(
                kept, *([100 * x[n] for x in own] for n in ("low", "high")), color=color, alpha=0.12, linewidth=0
            )
        for peer, color in DRAWN_PEERS.items():
            own = [x for x in peers() if (x["method"], x["length"], x["question_visible"]) == (peer, length, visible)]
            panel.plot(
                [100 * x["keep"] for x in own], [100 * x["accuracy"] for x in own], color=color, marker="x", linestyle="",
                label=f"{peer} of a peer",
            )  # fmt: skip
        panel.set(xscale="log", xlabel="entries kept, %", ylim=(0, 102))
        panel.set_xticks([5, 10, 25, 50], labels=["5", "10", "25", "50"], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_title(f"{length} tokens, question {'visible' if visible else 'hidden'}", fontsize=10)
    figure.legend(*panel.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.axes[0].set_ylabel("exact match, %")
    figure.savefig(path, dpi=80)


def behind(result: dict) -> list[str]:
    """Where a peer's figure for the same method is above our interval, or is of another number of entries."""
    found = []
    ours = {(x["method"], x["budget"], x["length"], x["question_visible"]): x for x in result["lines"]}
    for x in peers():
        words, keep = ("full", 1.0) if x["method"] == "full" else (PEERS.get(x["method"]), x["keep"])
        line = ours.get((words, keep, x["length"], x["question_visible"]))
        if line is None or line["n"] < x["n"]:
            continue
        name = f"{words} {100 * keep:.0f} % of {x['length']}, {'visible' if x['question_visible'] else 'hidden'}"
        if x["accuracy"] > line["high"]:
            found.append(
                f"{name}: {100 * line['accuracy']:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}], "
                f"peer {100 * x['accuracy']:.1f}"
            )
        if abs(line["kept"] - keep) > 0.02 * keep:
            found.append(f"{name}: keeps {100 * line['kept']:.2f} %")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "kvc-mini"))
    parser.add_argument(
        "--tasks", type=Path, default=ROOT / "models" / "tasks", help="folder of shared_LENGTH.jsonl.gz"
    )
    parser.add_argument("--methods", help="comma-separated; default: the registry, peers' settings, some compositions")
    parser.add_argument("--keep", type=float, nargs="*", default=list(KEEP))
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--limit", type=int, help="questions a task (default: 24, at 4096 tokens 12)")
    parser.add_argument(
        "--contexts", type=int, help="only so many contexts, evenly spread over all, to see how long it takes"
    )
    parser.add_argument("--question", choices=["both", "visible", "hidden"], default="both")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--jobs", type=int, help="processes, each holds the model (default: the cores, or what fits into the GPU)"
    )
    parser.add_argument("--threads", type=int, help="of each process")
    parser.add_argument("--tokens", type=int, help="of prompts that a process takes at a time")
    parser.add_argument("--no-times", action="store_true", help="leave out the timing of each method")
    parser.add_argument("--records", type=Path, default=RESULTS / "quality_kvc_mini.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_kvc_mini.json")
    parser.add_argument("--table", action="store_true", help="print --out as Markdown and end")
    parser.add_argument("--plot", type=Path, help="draw --out and end")
    args = parser.parse_args()
    if not args.table and not args.plot:
        import torch

        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        cores = os.cpu_count() or 1
        if args.jobs is None and args.device.startswith("cuda"):
            args.jobs = min(cores, max(1, torch.cuda.get_device_properties(args.device).total_memory // GPU_PROCESS))
        args.jobs = args.jobs or cores
        result = measure(args)
        rows = ",\n  ".join(json.dumps(line) for line in result.pop("lines"))
        args.out.write_text(json.dumps(result, indent=1)[:-2] + f',\n "lines": [\n  {rows}\n ]\n}}\n')
        draw(json.loads(args.out.read_text()), args.out.with_suffix(".png"))
    result = json.loads(args.out.read_text())
    if args.plot:
        draw(result, args.plot)
        return
    for length in args.lengths:
        if any(x["length"] == length for x in result["lines"]):
            print(f"{length} tokens\n\n{table(result, length)}\n")
    for line in behind(result):
        print("behind the peer:", line, file=sys.stderr)


if __name__ == "__main__":
    main()
