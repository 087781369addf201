"""Kernels against torch and against the floor of this machine: `python bench/run.py --help`."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import pkgutil
import platform
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench
import kvcompress
from bench.harness import ceilings, measure


def stages() -> list[str]:
    return sorted(
        m.name.removeprefix("bench_") for m in pkgutil.iter_modules(bench.__path__) if m.name.startswith("bench_")
    )


def tests_pass(stage: str, device: str) -> bool:
    """A figure of wrong results is no figure: the stage's own tests come first."""
    root = Path(__file__).parent.parent
    marker = ["-m", "cuda"] if device == "cuda" else ["-m", "not cuda"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *marker, f"tests/{stage}"]
    return subprocess.run(command, cwd=root, stdout=sys.stderr).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=stages(), action="append", help="only these stages (default: all)")
    parser.add_argument("--op", help="only ops whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15, help="medians over this many interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="the smallest shapes only")
    parser.add_argument("--untested", action="store_true", help="do not run the stage's tests first")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    chosen = args.stage or stages()
    if not args.untested:
        red = [stage for stage in chosen if not tests_pass(stage, device.type)]
        if red:
            sys.exit(f"bench: the tests of {', '.join(red)} fail on {device.type}; no figures until they pass")

    limit = ceilings(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, kvcompress {kvcompress.__version__}")
    print(
        f"ceilings measured now: read {limit.read / 1e12:.2f} TB/s, copy {limit.copy / 1e12:.2f} TB/s, "
        f"matmul {limit.matmul / 1e12:.1f} TFLOP/s, exp {limit.exp / 1e12:.2f} T/s"
    )
    rows = []
    for stage in chosen:
        for case in importlib.import_module(f"bench.bench_{stage}").cases(device, quick=args.quick):
            if args.op and args.op not in case.op:
                continue
            floor = limit.floor(case)
            print(f"\n{case.op}  {case.label}  floor {floor * 1e6:.1f} us {case.notes and '(' + case.notes + ')'}")
            for variant, time in measure(case, device, rounds=args.rounds).items():
                spread = f"{time['low'] * 1e6:.1f} - {time['high'] * 1e6:.1f}"
                ratio = time["median"] / floor
                print(f"  {variant:34s} {time['median'] * 1e6:10.1f} us  {ratio:6.2f}x floor  [{spread}]", flush=True)
                rows.append(
                    {
                        "stage": stage,
                        "op": case.op,
                        "case": case.label,
                        **case.params,
                        "variant": variant,
                        "median_us": time["median"] * 1e6,
                        "low_us": time["low"] * 1e6,
                        "high_us": time["high"] * 1e6,
                        "floor_us": floor * 1e6,
                        "floor_ratio": ratio,
                    }
                )
    if args.json:
        report = {
            "device": name,
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "kvcompress": kvcompress.__version__,
            "rounds": args.rounds,
            "ceilings": {
                "read_bytes_s": limit.read,
                "copy_bytes_s": limit.copy,
                "matmul_flop_s": limit.matmul,
                "exp_s": limit.exp,
            },
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
