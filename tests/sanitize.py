"""compute-sanitizer over the tests of all ops: `make sanitize`, or `python -m tests.sanitize --help`.

All four tools, each over every file of tests, side by side: racecheck, initcheck, memcheck, synccheck. Of each test at
most `--sample` parametrisations run, evenly spread, and few fuzz examples: the shapes are the odd ones that the tests
are made of. racecheck, memcheck and synccheck look at this library's kernels only; initcheck must see torch's too,
since they are who writes the inputs. Ends with an error unless every process found nothing and every tool ran a test
of every room.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["racecheck", "initcheck", "memcheck", "synccheck"]  # the slowest start first
ROOMS = ["score", "budget", "select", "store", "attend"]


def run(tool: str, file: Path, sample: int, limit: float, folder: Path) -> tuple[bool | None, str]:
    """One process: whether it is clean, None where the file has no test for a GPU, and a line that says what ran."""
    room, name = file.parent.name, file.stem.removeprefix("test_")
    log = folder / f"{tool}_{room}_{name}.log"
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "application-only", "--launch-timeout", "0"]
    command += ["--print-limit", "100000"] if tool == "initcheck" else ["--kernel-name", "kernel_substring=kvc"]
    command += [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "--sample", str(sample)]
    environment = {**os.environ, "KVCOMPRESS_REQUIRE_CUDA": "1", "OMP_NUM_THREADS": "1"}
    if tool in ("memcheck", "initcheck"):
        # else one block of the allocator hides who reads beyond his own; nothing can be captured then
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    skipped = "not 64_bit and not long" + (" and not graph" if "PYTORCH_NO_CUDA_MEMORY_CACHING" in environment else "")
    command += ["-k", skipped]  # tens of GiB each, side by side
    begin = time.monotonic()
    code: int | str
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, str(file)], cwd=ROOT, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool's child too: left alone it would go on using the GPU
            process.wait()
            code = f"none after {limit:.0f} s"
    text = log.read_text()
    if re.search(r"no tests ran|^\d+ deselected in", text, re.MULTILINE):
        return None, f"{tool:10s} {room}/{name:30s} has no test for a GPU"
    passed, failed = (re.search(rf"(\d+) {word}", text) for word in ("passed", "failed"))
    ran = re.search(r"ERROR SUMMARY|RACECHECK SUMMARY", text) is not None
    found = errors(tool, text)
    is_clean = code == 0 and passed is not None and failed is None and ran and found == 0
    tests = f"{passed[1] if passed else 'no'} tests passed, {failed[1] if failed else 0} failed"
    what = f"{tests}, {found if ran else '?'} errors, exit code {code}"
    return is_clean, f"{tool:10s} {room}/{name:30s} {what}, {time.monotonic() - begin:.0f} s"


def errors(tool: str, text: str) -> int:
    """What the tool found. Of reads of what was never written, those by this library's kernels: tests themselves copy
    buffers whose gaps nobody fills.
    """
    if tool == "initcheck":
        return len(re.findall(r"Uninitialized .* read of size .*\n=+ +at [^\n]*\bkvc::", text))
    counts = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    return sum(int(a or b) for a, b in counts)


def main() -> None:
    form = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form.add_argument("--tool", choices=TOOLS, action="append", help="only these (default: all four)")
    form.add_argument("--room", choices=ROOMS, action="append", help="only these (default: all)")
    form.add_argument("--op", help="only files of tests whose name contains this")
    form.add_argument("--sample", type=int, default=4, help="parametrisations of a test (default: 4)")
    form.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side (default: all cores)")
    form.add_argument("--limit", type=float, default=600, help="seconds a process may take (default: 600)")
    form.add_argument("--logs", type=Path, default=ROOT / "build" / "sanitize", help="folder of the full logs")
    args = form.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    files = [file for room in args.room or ROOMS for file in sorted((ROOT / "tests" / room).glob("test_*.py"))]
    files = [file for file in files if args.op is None or args.op in file.stem]
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = {
            pool.submit(run, tool, file, args.sample, args.limit, args.logs): (tool, file.parent.name)
            for tool in TOOLS
            if tool in (args.tool or TOOLS)
            for file in files
        }
        results: dict[tuple[str, str], list[bool]] = {what: [] for what in tasks.values()}
        for task in as_completed(tasks):
            is_clean, line = task.result()
            if is_clean is not None:
                results[tasks[task]].append(is_clean)
            print(line, flush=True)
    if untested := [" ".join(what) for what, clean in results.items() if not clean]:
        sys.exit(f"no test ran under {', '.join(untested)}; the logs are in {args.logs}")
    if not all(all(clean) for clean in results.values()):
        sys.exit(f"not clean; the logs are in {args.logs}")


if __name__ == "__main__":
    main()
