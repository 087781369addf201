"""The board: every method of the registry on kvc-mini, at four budgets, question visible and hidden, beside the peers' figures.

    python bench/quality.py --jobs 2                 # measures; writes bench/results/quality_kvc_mini.json
    python bench/quality.py --jobs 16 --device cuda  # the same on a GPU
    python bench/quality.py --table                  # that file as the README's table
    python bench/quality.py --plot board.png         # accuracy over entries kept

It can be ended and started again: what was measured is kept in --records and skipped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path

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
# Beside the defaults: settings that suit this model's short questions, and one of several methods together.
MORE = (
    "squeeze_attention+snapkv:window=16", "zigzagkv+snapkv:window=16", "chunkkv:window=16", "obcache:window=16",
    "adakv+keydiff", "keydiff:before_rope=True:window=32:sink=4", "auto:attention=0",
)  # fmt: skip
# Not a line each: what evicts while decoding is the same at the end of the prompt, where these answers begin.
LATER = ("prefill_decode", "while_decoding", "morphkv")
TIMED_AT = 0.1  # the share at which methods are timed, by a process alone


def board(words: str | None) -> list[str]:
    from kvcompress import methods

    known = methods.available()
    if words:
        return words.split(",")
    peers = [name for name in PEERS.values() if name.split(":")[0] in known]
    return list(dict.fromkeys([*(name for name in known if name not in LATER), *peers, *MORE]))


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

    group, modes, done = job
    found = evaluate(
        _worker["model"],
        _worker["tokenizer"],
        group,
        _worker["candidates"],
        question_visible=modes,
        done=done,
        batch=64,
        timed=0,
    )
    return [record.to_dict() for record in found]


def times(args: argparse.Namespace, group: list) -> dict[str, dict]:
    """Seconds of every method on one question at `TIMED_AT`, in this process, with nothing beside it; after a warm-up."""
    from kvcompress.evaluate import evaluate

    start(argparse.Namespace(**{**vars(args), "keep": [TIMED_AT]}), args.threads or os.cpu_count() or 1)
    model, tokenizer, candidates = (_worker[name] for name in ("model", "tokenizer", "candidates"))
    for timed in (0, 1):
        found = evaluate(model, tokenizer, group[:1], candidates, question_visible=[False], timed=timed)
        seconds = {r.method: {n: getattr(r, n) for n in ("prefill_s", "compress_s", "decode_s")} for r in found}
    return seconds


def measure(args: argparse.Namespace) -> dict:
    from kvcompress.cli.eval import load_records
    from kvcompress.evaluate import Record, read_samples
    from kvcompress.evaluate.metrics import means
    from kvcompress.evaluate.tasks import by_context, first

    held = load_records(args.records) if args.records.exists() else []
    groups = []
    for length in args.lengths:
        samples = read_samples(args.tasks / f"shared_{length}.jsonl.gz")
        groups += by_context(first(samples, args.limit or LIMITS[length]))
    modes = {"both": (True, False), "visible": (True,), "hidden": (False,)}[args.question]
    done = {r.key for r in held}
    jobs = [(group, modes, {key for key in done if key[2] in {s.id for s in group}}) for group in groups]
    jobs.sort(key=lambda job: -job[0][0].length)
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    started = time.perf_counter()
    seconds = {} if args.no_times else times(args, groups[0])
    with (
        args.records.open("a") as sink,
        multiprocessing.get_context("spawn").Pool(args.jobs, start, (args, threads)) as pool,
    ):
        for number, rows in enumerate(pool.imap_unordered(work, jobs), 1):
            sink.writelines(json.dumps(row) + "\n" for row in rows)
            sink.flush()
            print(f"{number}/{len(jobs)} contexts, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    wall = time.perf_counter() - started
    ids = {sample.id for group in groups for sample in group}
    records = [r for r in map(Record.from_dict, map(json.loads, args.records.open())) if r.id in ids]
    tasks: dict = {}
    for r in records:
        key = (r.method, r.budget, r.length, r.question_visible)
        tasks.setdefault(key, {}).setdefault(r.task, []).append(r.right)
    lines = means(records)
    for line in lines:
        own = tasks[line["method"], line["budget"], line["length"], line["question_visible"]]
        line["tasks"] = {task: round(sum(right) / len(right), 4) for task, right in own.items()}
        timed_at = 1.0 if line["method"] == "full" else TIMED_AT
        if line["budget"] == timed_at and line["length"] == args.lengths[0] and not line["question_visible"]:
            line.update(seconds.get(line["method"], {}))
        for name, value in line.items():
            line[name] = round(value, 5) if isinstance(value, float) else value
    order = {name: place for place, name in enumerate(["full", *board(args.methods)])}
    lines.sort(key=lambda x: (x["length"], not x["question_visible"], order.get(x["method"], 99), -x["budget"]))
    return {"where": where(args), "wall_s": None if held else round(wall, 1), "lines": lines}


def joined(old: dict, new: dict) -> dict:
    """The lines of both; of what both have, the new ones. Every line says which run it is of."""
    runs = old.get("runs") or [{name: old.get(name) for name in ("where", "wall_s", "note") if name in old}]
    runs = [*runs, {name: new[name] for name in ("where", "wall_s")}]

    def kind(line: dict) -> tuple:
        return line["method"], line["budget"], line["length"], line["question_visible"]

    measured = {kind(line) for line in new["lines"]}
    lines = [{"run": 0, **line} for line in old["lines"] if kind(line) not in measured]
    lines += [{"run": len(runs) - 1, **line} for line in new["lines"]]
    order = {name: place for place, name in enumerate(["full", *board(None)])}
    lines.sort(key=lambda x: (x["length"], not x["question_visible"], order.get(x["method"], 99), -x["budget"]))
    return {"runs": runs, "lines": lines}


def where(args: argparse.Namespace) -> dict:
    import torch

    cuda = str(args.device).startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"device": device, "jobs": args.jobs, "torch": torch.__version__, "dtype": "float32"}


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
    rows = ["| method | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(columns)]
    for method, cells in ours.items():
        shown = []
        for visible, keep in columns:
            line = cells.get((visible, 1.0 if method == "full" else keep))
            text = "" if line is None else f"{100 * line['accuracy']:.1f}"
            peer = theirs.get((named.get(method), visible, keep))
            shown.append(text if peer is None else f"{text} ({100 * peer:.1f})")
        name, *settings = method.split(":")
        rows.append(f"| `{name}`{' ' + ', '.join(settings) if settings else ''} | " + " | ".join(shown) + " |")
    for peer in dict.fromkeys(x["method"] for x in peers() if x["method"] not in ("full",)):
        if PEERS.get(peer) not in ours:
            cells = [theirs.get((peer, *column)) for column in columns]
            shown = ["" if cell is None else f"({100 * cell:.1f})" for cell in cells]
            rows.append(f"| {peer} of a peer | " + " | ".join(shown) + " |")
    return "\n".join(rows)


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
    panel.legend(fontsize=6, loc="lower right")
    figure.axes[0].set_ylabel("exact match, %")
    figure.savefig(path, dpi=80)


def behind(result: dict) -> list[str]:
    """Where a peer's figure for the same method is above our interval."""
    found = []
    for x in peers():
        for line in result["lines"]:
            same = (line["method"], line["budget"], line["length"], line["question_visible"])
            if (
                same == (PEERS.get(x["method"]), x["keep"], x["length"], x["question_visible"])
                and x["accuracy"] > line["high"]
            ):
                found.append(
                    f"{same}: {100 * line['accuracy']:.1f} [{100 * line['high']:.1f}], peer {100 * x['accuracy']:.1f}"
                )
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
    parser.add_argument("--question", choices=["both", "visible", "hidden"], default="both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes; each holds the model")
    parser.add_argument("--threads", type=int, help="of each process")
    parser.add_argument("--no-times", action="store_true", help="leave out the timing of each method")
    parser.add_argument("--records", type=Path, default=RESULTS / "quality_kvc_mini.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_kvc_mini.json")
    parser.add_argument("--add", action="store_true", help="lines of --out that this run does not measure stay")
    parser.add_argument("--table", action="store_true", help="print --out as Markdown and end")
    parser.add_argument("--plot", type=Path, help="draw --out and end")
    args = parser.parse_args()
    if not args.table and not args.plot:
        result = measure(args)
        if args.add:
            result = joined(json.loads(args.out.read_text()), result)
        rows = ",\n  ".join(json.dumps(line) for line in result.pop("lines"))
        args.out.write_text(json.dumps(result, indent=1)[:-2] + f',\n "lines": [\n  {rows}\n ]\n}}\n')
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
