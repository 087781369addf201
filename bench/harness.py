"""Timing that can be believed: cold L2, variants interleaved, medians over rounds, ceilings measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Variant = Callable[[int], object]  # called with the number of the input copy to work on


@dataclass
class Case:
    """One row of a table: what is measured, what it must move and compute, and who does it.

    `make(copy)` builds one set of inputs; `variants` take that set. Bytes count each input read once and each output
    written once; the floor is the largest of bytes, FLOP and exponentials over their measured ceilings.
    """

    op: str
    label: str
    make: Callable[[], object]
    variants: dict[str, Callable[[object], object]]
    read: float = 0.0
    written: float = 0.0
    flop: float = 0.0
    exponentials: float = 0.0
    footprint: float = 0.0  # bytes of one set of inputs; enough copies are made to leave L2
    restore: Callable[[object], None] | None = None  # undoes an in-place op, outside the timing
    notes: str = ""
    params: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches, measured here: bytes/s read, bytes/s copied (read + written), FLOP/s, exponentials/s."""

    read: float
    copy: float
    matmul: float
    exp: float

    def floor(self, case: Case) -> float:
        """Seconds that no implementation beats."""
        if case.written and case.read:
            moving = (case.read + case.written) / self.copy if case.written > 0.1 * case.read else case.read / self.read
        else:
            moving = case.read / self.read
        return max(moving, case.flop / self.matmul, case.exponentials / self.exp)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(run: Callable[[], object], device: torch.device, inner: int) -> float:
    """Seconds a call, over `inner` calls queued back to back."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # the queue fills while the GPU waits: host time does not show
        start.record()
        for _ in range(inner):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / inner
    begin = time.perf_counter()
    for _ in range(inner):
        run()
    return (time.perf_counter() - begin) / inner


def ceilings(device: torch.device) -> Ceilings:
    """A large copy, a large sum, a large bf16 (CPU: float32) matrix product, many exponentials."""
    cuda = device.type == "cuda"
    size = 2**29 if cuda else 2**25
    x = torch.randn(size, device=device)
    y = torch.empty_like(x)
    n = 8192 if cuda else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    small = x[: 2**22]
    out = torch.empty_like(small)

    def best(run: Callable[[], object], inner: int) -> float:
        run()
        sync(device)
        return min(once(run, device, inner) for _ in range(7))

    copy = 8 * size / best(lambda: y.copy_(x), 3)
    read = 4 * size / best(lambda: torch.sum(x), 3)
    matmul = 2 * n**3 / best(lambda: a @ a, 5)
    # MUFU rate: 16 a clock and SM on Hopper and Ampere; on CPU what torch's vectorised exp2 reaches
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        clock = torch.cuda.clock_rate(device) * 1e6 if hasattr(torch.cuda, "clock_rate") else 1.755e9
        exp = 16 * properties.multi_processor_count * max(clock, 1.0e9)
    else:
        exp = small.numel() / best(lambda: torch.exp2(small, out=out), 3)
    return Ceilings(max(read, copy / 2), copy, matmul, exp)


def measure(case: Case, device: torch.device, *, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Median, spread (quartiles) of each variant in seconds, variants interleaved round by round."""
    l2 = 128e6 if device.type == "cuda" else 64e6
    copies = max(2, min(24, int(l2 / max(case.footprint, 1)) + 2))
    sets = [case.make() for _ in range(copies)]
    times: dict[str, list[float]] = {name: [] for name in case.variants}
    for run in case.variants.values():  # warm up on like data
        for inputs in sets[:2]:
            run(inputs)
            if case.restore:
                case.restore(inputs)
    sync(device)
    for _ in range(rounds):
        for name, run in case.variants.items():
            turn = iter(range(10**9))
            inner = copies if case.restore is None else 1
            if case.restore is None:
                times[name].append(once(lambda run=run, turn=turn: run(sets[next(turn) % copies]), device, inner))
            else:
                pick = sets[len(times[name]) % copies]
                times[name].append(once(lambda run=run, pick=pick: run(pick), device, 1))
                case.restore(pick)
    table = {}
    for name, samples in times.items():
        quartiles = statistics.quantiles(samples, n=4)
        table[name] = {"median": statistics.median(samples), "low": quartiles[0], "high": quartiles[2]}
    return table
