"""Another state of the tree beside this one: built into a cache folder, measured by a process of its own, turn by turn.

One process cannot hold two libraries that register the same ops, nor one library that takes two kinds of card for what
it runs on. So a worker process imports the other build, sets up the same cases from this tree's bench files, and waits
on its standard input between its turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.harness import Case, Runner, warmed

ROOT = Path(__file__).resolve().parent.parent


def built(reference: str, device: torch.device) -> Path:
    """The `python` folder of a built tree: a folder that is one already, or the git reference built into the cache.

    The build for a CPU leaves the CUDA kernels out, and lies apart from the one for a GPU.
    """
    given = Path(reference)
    if (given / "kvcompress" / "libkvcompress.so").is_file():
        return given.resolve()

    def git(*words: str, cwd: Path = ROOT) -> str:
        done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench: --base must be a git reference or a folder with a built kvcompress, got {reference}: "
                     f"{done.stderr.strip()}")  # fmt: skip
        return done.stdout.strip()

    commit = git("rev-parse", "--verify", f"{reference}^{{commit}}")
    tree = ROOT / "build" / "base" / f"{commit[:12]}-{device.type}"
    if not tree.exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(tree), commit)
    package = tree / "python"
    if not (package / "kvcompress" / "libkvcompress.so").is_file():
        configure = ["cmake", "-S", ".", "-B", "build/dev", "-DKVC_PYTHON=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
        if device.type == "cuda":
            architecture = "{}{}-real".format(*torch.cuda.get_device_capability(device))
            configure += ["-DKVC_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"]
        else:
            configure += ["-DKVC_CUDA=OFF"]
        install = ["cmake", "--install", "build/dev", "--prefix", "python/kvcompress", "--component", "python"]
        for command in (configure, ["cmake", "--build", "build/dev", "-j"], install):
            print(f"base {commit[:12]}: {' '.join(command[:3])} ...", file=sys.stderr, flush=True)
            if subprocess.run(command, cwd=tree, stdout=sys.stderr).returncode:
                sys.exit(f"bench: {reference} ({commit[:12]}) does not build; its tree is {tree}")
    return package


class Worker:
    """Another process, with the package in the folder `package` and more in its environment. One line a question."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device, package: Path, **more: str):
        self.name = name
        path = [str(package), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **more, "PYTHONPATH": os.pathsep.join(path)}
        options = [str(int(yes)) for yes in (args.quick, args.warm, args.sweep)]
        command = [sys.executable, "-m", "bench.base", str(device), *options]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._method = None if args.method in (None, "all") else args.method

    def _ask(self, **question: object) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"bench: the process of {self.name} ended with code {self.process.wait()}")
        return json.loads(answer)

    def prepare(self, case: Case, stage: str) -> tuple[list[str], dict[str, str]]:
        """Sets the case up over there; the names of our variants, and which fail there and why."""
        answer = self._ask(stage=stage, op=case.op, label=case.label, method=self._method)
        return answer["names"], answer["failed"]

    def time(self, name: str) -> float:
        """Seconds a call of one of these variants, over one round."""
        return self._ask(time=name)["seconds"]


def serve(device: torch.device, *, quick: bool, warm: bool, sweep: bool) -> None:
    """The worker's side."""
    from bench import peers
    from bench.run import stage_cases

    answers = os.fdopen(os.dup(1), "w")  # what others print must not be taken for an answer
    os.dup2(2, 1)
    peers.left_out = [""]  # all of them: ours alone are measured here
    cases: dict[str, dict[tuple[str, str], Case]] = {}
    runner = None
    for line in sys.stdin:
        question = json.loads(line)
        if "time" in question:
            assert runner is not None
            answer: dict[str, object] = {"seconds": runner.time(question["time"])}
        else:
            runner = None  # frees the inputs of the case before
            stage = question["stage"]
            if stage not in cases:
                own = stage_cases(stage, device, quick=quick, method=question["method"], sweep=sweep)
                cases[stage] = {(case.op, case.label): case for case in own}
            case = cases[stage][question["op"], question["label"]]
            case.variants = {name: run for name, run in case.variants.items() if name.startswith("kvcompress")}
            runner = Runner(warmed(case) if warm else case, device, warm=warm)
            answer = {"names": runner.names(), "failed": runner.failed}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    on, *switches = sys.argv[1:]
    serve(torch.device(on), **{name: word == "1" for name, word in zip(("quick", "warm", "sweep"), switches)})
