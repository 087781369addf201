"""Kernels and methods against torch, against other libraries and against the floor of this machine.

    python bench/run.py --op topk                 one op
    python bench/run.py --stage score             one stage
    python bench/run.py --method snapkv           one method, all its stages
    python bench/run.py --core --save             the table of the core ops into bench/results/<device>_core.json
    python bench/run.py --op topk --base main~5   this tree beside another state of it, turn by turn
    python bench/run.py --core --sm80             this build beside what it does on cards before Hopper
    python bench/run.py --sweep --save            shapes of one size each: which costs more than twice the best one

Every case runs the tests of its op first and reports nothing when one fails. Inputs rotate and the cache is flushed
before every round; the floor is what the bytes, products and exponentials of a case cost at the rates measured in the
same run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import kvcompress
from bench import base, peers, report
from bench.ceilings import ceilings, device_name
from bench.harness import Case, Runner, chosen, summary, warmed

ROOT = Path(__file__).resolve().parent.parent


def stages() -> list[str]:
    names = (module.name for module in pkgutil.iter_modules(bench.__path__))
    return sorted(name.removeprefix("bench_") for name in names if name.startswith("bench_"))


def stage_cases(
    stage: str, device: torch.device, *, quick: bool, method: str | None = None, sweep: bool = False
) -> Iterator[Case]:
    """All cases of a stage, or those of its sweep, in an order that only the arguments decide."""
    module = importlib.import_module(f"bench.bench_{stage}")
    if sweep:
        return module.sweep(device) if hasattr(module, "sweep") else iter(())
    function = module.cases
    options: dict[str, object] = {"quick": quick}
    if method and "method" in inspect.signature(function).parameters:
        options["method"] = method
    return function(device, **options)


# --- tests first


def test_files(case: Case) -> list[str]:
    """What pytest is to run for a case: a file, and behind :: which of its tests."""
    method = case.params.get("method")
    if method:
        files = [f"tests/methods/test_{method}.py", f"tests/methods/test_golden.py::{method}-"]
        return [name for name in files if (ROOT / name.split("::")[0]).exists()]
    found = [path for op in case.tested_ops() for path in (ROOT / "tests").glob(f"*/test_{op.rstrip('_')}.py")]
    return [path.relative_to(ROOT).as_posix() for path in found]


def red_tests(cases: Sequence[Case], device: torch.device) -> list[str]:
    """Test files that fail here: a figure of wrong results is no figure."""
    untested = sorted({case.op for case in cases if not test_files(case)})
    if untested:
        sys.exit(f"bench: no tests found for {', '.join(untested)}; --untested reports all the same, and says so")
    red = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if device.type == "cuda":
        environment["KVCOMPRESS_REQUIRE_CUDA"] = "1"
    options = [
        "-q",
        "-x",
        "-c",
        os.devnull,
        "--rootdir",
        str(ROOT),
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    options += ["-W", "ignore::pytest.PytestUnknownMarkWarning", "-m", "cuda" if device.type == "cuda" else "not cuda"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(8, max(1, (os.cpu_count() or 2) // 2)))]

    def code(names: Sequence[str]) -> int:
        words = " or ".join(word for name in names for word in name.split("::")[1:])
        paths = [name.split("::")[0] for name in names]
        print(f"testing {' '.join(paths)} {words}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pytest", *options, *paths, *(["-k", words] if words else [])]
        return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, env=environment).returncode

    files = list(dict.fromkeys(name for case in cases for name in test_files(case)))
    whole = [name for name in files if "::" not in name]
    if whole and code(whole) == 0:  # one process for all; who failed is asked only where it matters
        files = [name for name in files if name not in whole]
    for name in files:
        path = name.split("::")[0]
        failed = code([name])
        none_for_gpu = failed == 5 and device.type == "cuda" and path.startswith("tests/methods/")
        if failed and not none_for_gpu:
            red.append(path)
    return red


# --- measuring


def measured(
    case: Case, stage: str, device: torch.device, args: argparse.Namespace, others: Sequence[base.Worker]
) -> dict:
    """All variants of a case, interleaved round by round, those of other processes among them."""
    runner = Runner(case, device, warm=args.warm, without=args.without)
    turns: dict[str, Callable[[], float]] = {name: partial(runner.time, name) for name in runner.names()}
    failed = dict(runner.failed)
    for other in others:
        names, why = other.prepare(case, stage)
        turns |= {f"{other.name}: {name}": partial(other.time, name) for name in names}
        failed |= {f"{other.name}: {name}": reason for name, reason in why.items()}
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(args.rounds):
        for name, timed in turns.items():
            samples[name].append(timed())
    return {"times": {name: summary(own) for name, own in samples.items()}, "absent": {**case.absent, **failed}}


def rows_of(case: Case, stage: str, result: dict, floor: float, target: str) -> list[dict]:
    """One flat record a variant."""
    times = result["times"]
    rows = []
    for variant, own in times.items():
        like = "kvcompress, in a graph" if variant.endswith(", in a graph") else "kvcompress"
        ours = times.get(like, {}).get(target)
        row = {"stage": stage, "op": case.op, "case": case.label, **case.params, "variant": variant}
        row |= {f"{name}_us": seconds * 1e6 for name, seconds in own.items()}
        row |= {"floor_us": floor * 1e6, "floor_ratio": own[target] / floor, "bytes_s": case.moved() / own[target]}
        if ours and not variant.startswith("kvcompress"):
            row["times_ours"] = own[target] / ours
        rows.append(row)
    return rows


def show(case: Case, rows: Sequence[dict], absent: dict[str, str], target: str, elapsed: float) -> None:
    floor = rows[0]["floor_us"] if rows else float("nan")
    print(f"\n{case.op}  {case.label}  floor {floor:.1f} us {case.notes and '(' + case.notes + ')'}  [{elapsed:.1f} s]")
    for row in rows:
        spread = f"[{row['low_us']:.1f} - {row['high_us']:.1f}]"
        peer = f"{row['times_ours']:7.2f}x ours" if "times_ours" in row else ""
        taken = f"{row[target + '_us']:10.1f} us {row['floor_ratio']:7.2f}x floor"
        print(f"  {row['variant']:38s} {taken}  {spread:22s} {peer}", flush=True)
    for peer, why in absent.items():
        print(f"  {peer:38s} not measured: {why}")


def parser() -> argparse.ArgumentParser:
    form = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form.add_argument("--stage", choices=stages(), action="append", help="only these stages")
    form.add_argument("--op", action="append", default=[], help="only cases whose op contains this; may be repeated")
    form.add_argument("--case", help="only cases whose label contains this")
    form.add_argument("--method", help="one method of the registry, or 'all'")
    form.add_argument("--core", action="store_true", help="only the table of the core ops")
    form.add_argument("--sweep", action="store_true", help="shapes of one size each instead, and which of them is slow")
    form.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    form.add_argument("--rounds", type=int, default=15, help="interleaved rounds; medians on a GPU, best on a CPU")
    form.add_argument("--limit", type=float, metavar="SECONDS", help="start no case later than this")
    form.add_argument("--quick", action="store_true", help="the smallest shapes, no torch.compile")
    form.add_argument("--warm", action="store_true", help="inputs stay in the cache; floors likewise")
    form.add_argument("--untested", action="store_true", help="do not run the tests first; the report says so")
    form.add_argument("--without", action="append", default=[], metavar="PEER", help="leave out variants named so")
    form.add_argument("--base", metavar="GITREF", help="also that state of the tree, or a folder with a built package")
    form.add_argument("--sm80", action="store_true", help="also this build as on a card of sm_80: no clusters, no TMA")
    form.add_argument("--json", type=Path, help="write all figures to this file")
    results = ROOT / "bench" / "results"
    form.add_argument("--save", type=Path, nargs="?", const=results if results.exists() else Path(), metavar="FOLDER",
                      help="write <device>_<what>.json and its plots into this folder (bench/results)")  # fmt: skip
    form.add_argument("--plot", action="store_true", help="draw time over seq_len beside the JSON file")
    return form


def main(argv: Sequence[str] | None = None) -> None:
    form = parser()
    args = form.parse_args(argv)
    if args.plot and not (args.json or args.save):
        form.error("--plot needs --json or --save: the picture lies beside the figures")
    if args.sm80 and torch.device(args.device).type != "cuda":
        form.error("--sm80 needs a GPU: it is about CUDA kernels")
    if (args.plot or args.save) and importlib.util.find_spec("matplotlib") is None:
        sys.exit("bench: plots need matplotlib: pip install 'kvcompress[plots]'")
    device = torch.device(args.device)
    peers.left_out = args.without
    names = args.stage or (["methods"] if args.method else [name for name in stages() if name != "methods"])
    wanted = []
    for stage in names:
        method = None if args.method in (None, "all") else args.method
        cases = stage_cases(stage, device, quick=args.quick, method=method, sweep=args.sweep)
        wanted += [(stage, case) for case in chosen(cases, args.op, args.case, args.core)]
    if not wanted:
        sys.exit("bench: no case fits; `--stage`, `--op`, `--case` and `--method` narrow what --help lists")
    if not args.untested:
        red = red_tests([case for _, case in wanted], device)
        if red:
            sys.exit(f"bench: {', '.join(red)} fail on {device.type}; no figures until they pass")

    others = []
    if args.base:
        others.append(base.Worker("base", args, device, base.built(args.base, device)))
    if args.sm80:
        here = Path(kvcompress.__file__).parent.parent
        others.append(base.Worker("sm_80", args, device, here, KVCOMPRESS_SM="80"))
    limit = ceilings(device)
    target = "median" if device.type == "cuda" else "best"  # a CPU is shared with whatever else runs
    name = device_name(device)
    print(f"{name}, torch {torch.__version__}, kvcompress {kvcompress.__version__}\nceilings measured now: {limit}")
    rows, missing = [], []
    started = time.monotonic()
    for stage, case in wanted:
        if args.warm:
            case = warmed(case)
        begin = time.monotonic()
        if args.limit and begin - started > args.limit:
            missing.append({"op": case.op, "case": case.label, "variant": "any", "why": f"--limit {args.limit:.0f} s"})
            continue
        try:
            result = measured(case, stage, device, args, others)
        except (
            RuntimeError
        ) as error:  # out of memory, or a kernel that failed: what was measured so far is still written
            missing.append({"op": case.op, "case": case.label, "variant": "all", "why": str(error).splitlines()[0]})
            print(f"\n{case.op}  {case.label}  not measured: {missing[-1]['why']}")
            if "CUDA error" in str(error):
                break  # nothing runs in this process any more
            continue
        own = rows_of(case, stage, result, case.floor(limit), target)
        show(case, own, result["absent"], target, time.monotonic() - begin)
        rows += own
        missing += [
            {"op": case.op, "case": case.label, "variant": v, "why": why} for v, why in result["absent"].items()
        ]
    figures = {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "kvcompress": kvcompress.__version__,
        "cache": "warm" if args.warm else "cold",
        "tested": not args.untested,
        "statistic": target,
        "rounds": args.rounds,
        "base": args.base,
        **({"sweep": report.spread(rows, target)} if args.sweep else {}),
        "ceilings": {
            "read_bytes_s": limit.read,
            "copy_bytes_s": limit.copy,
            "cache_read_bytes_s": limit.cache_read,
            "cache_bytes": limit.cache_bytes,
            "matmul_flop_s": limit.matmul,
            "exp_s": limit.exp,
        },
        "rows": rows,
        "not_measured": missing,
    }
    for line in report.spread_lines(figures):
        print(line)
    for path in report.paths(args, device, name):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"\nwritten: {path}")
        if args.plot or args.save:
            print(f"drawn: {', '.join(str(p) for p in report.draw(figures, path))}")
    broken = [entry for entry in missing if entry["variant"] == "all"]
    if broken:
        sys.exit(
            f"bench: {len(broken)} cases failed, the first: {broken[0]['op']} {broken[0]['case']}: {broken[0]['why']}"
        )


if __name__ == "__main__":
    main()
