"""Timing that can be believed: cold caches, variants interleaved, medians over rounds, floors from measured ceilings."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from bench.ceilings import Ceilings, cache_bytes, sync

Variant = Callable[[object], object]  # called with one set of inputs

# sets of inputs that take turns within a round; a CPU call is long beside what it takes to time it
MAX_COPIES = {"cuda": 24, "cpu": 3}
LONGEST_WAIT = 0.02  # seconds that the GPU is kept waiting so that the host can queue a round


@dataclass(frozen=True)
class Work:
    """What one pass over the data must do at least: bytes moved, products, exponentials.

    Bytes count each input read once and each output written once. `cached`: the pass reads what the pass before it
    has just read, so as far as it fits the cache it comes from there.
    """

    read: float = 0.0
    written: float = 0.0
    flop: float = 0.0
    exponentials: float = 0.0
    cached: bool = False

    def floor(self, limit: Ceilings) -> float:
        """Seconds that no implementation beats."""
        if self.cached and self.read <= limit.cache_bytes:
            moving = self.read / limit.cache_read
        elif self.written > 0.1 * self.read:
            moving = (self.read + self.written) / limit.copy
        else:
            moving = self.read / limit.read
        return max(moving, self.flop / limit.matmul, self.exponentials / limit.exp)


@dataclass
class Case:
    """One row of a table: what is measured, what it must move and compute, and who does it.

    `make()` builds one set of inputs; `variants` take that set, ours are named "kvcompress...". The floor is the sum over
    `passes`, or what the one pass `read`, `written`, `flop`, `exponentials` costs.
    """

    op: str  # a registered op, or several, "compact_, gather"; what follows may be words: "window_scores, lse given"
    label: str
    make: Callable[[], object]
    variants: dict[str, Variant]
    read: float = 0.0
    written: float = 0.0
    flop: float = 0.0
    exponentials: float = 0.0
    passes: Sequence[Work] = ()
    footprint: float = 0.0  # bytes of one set of inputs; bounds the number of sets
    restore: Callable[[object], None] | None = None  # undoes an in-place op, outside the timing: one call a round
    tests: Sequence[str] = ()  # ops whose tests must pass; by default those named in `op`
    graph: bool = False  # ours are also timed inside a CUDA graph, and
    captured: Sequence[str] = ()  # peers that are nothing but launches
    core: bool = False  # belongs to the table of the core ops
    absent: dict[str, str] = field(default_factory=dict)  # peer: why it is not measured
    notes: str = ""
    params: dict[str, object] = field(default_factory=dict)

    def floor(self, limit: Ceilings) -> float:
        work = self.passes or [Work(self.read, self.written, self.flop, self.exponentials)]
        return sum(one.floor(limit) for one in work)

    def moved(self) -> float:
        """Bytes that memory must give or take: what a later pass finds in the cache counts once."""
        work = self.passes or [Work(self.read, self.written)]
        return sum(one.read + one.written for one in work if not one.cached)

    def tested_ops(self) -> list[str]:
        """The ops whose tests vouch for this case."""
        if self.tests:
            return list(self.tests)
        names = [name.strip() for name in self.op.split(",")]
        return [name for name in names if hasattr(torch.ops.kvcompress, name)]


def once(run: Callable[[], object], device: torch.device, inner: int, queueing: float = 0.0) -> float:
    """Seconds a call, over `inner` calls queued back to back, which takes the host `queueing` seconds."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # the queue fills while the GPU waits, at 2 GHz or less: host time does not show
        torch.cuda._sleep(max(2_000_000, int(2e9 * 1.5 * queueing)))
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


def captured(launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What `launch` does, as a graph; it is called once before, on a stream of its own, for what libraries set up then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


class Flush:
    """Fills the last-level cache with clean lines that nobody asks for, so that what follows reads from memory."""

    def __init__(self, device: torch.device, limit_bytes: float):
        self.buffer = torch.zeros(int(2 * limit_bytes) // 4, device=device)

    def __call__(self) -> None:
        self.buffer.sum()


class Runner:
    """A case set up to be measured: its inputs made, its variants warm."""

    def __init__(self, case: Case, device: torch.device, *, warm: bool = False, without: Sequence[str] = ()):
        self.case, self.device, self.warm = case, device, warm
        cold = 2 * cache_bytes(device)
        wanted = 1 if warm else math.ceil(cold / max(case.footprint, 1)) + 1
        copies = 1 if warm else min(MAX_COPIES[device.type], max(2, wanted))
        self.inner = 1 if case.restore else copies
        self.sets = [case.make() for _ in range(copies)]
        self.flush = None if warm else Flush(device, cache_bytes(device))
        self.turn = 0
        self.variants: dict[str, Variant] = {}
        self.failed: dict[str, str] = {}
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.queueing: dict[str, float] = {}
        for name, run in case.variants.items():
            if any(words in name for words in without):
                self.failed[name] = "left out by --without"
                continue
            try:
                for inputs in self.sets[:2]:
                    run(inputs)
                    if case.restore:
                        case.restore(inputs)
                sync(device)
            except Exception as error:  # another library may fail in any way
                self.failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                continue
            self.variants[name] = run
            if device.type == "cuda":
                self.queueing[name] = self._queued(run)
                self._add_graph(name, run)

    def _queued(self, run: Variant) -> float:
        """Seconds that the host needs to queue a round; a call that waits for the GPU is not hidden by any wait."""
        begin = time.perf_counter()
        for inputs in self.sets[: self.inner]:
            run(inputs)
        seconds = time.perf_counter() - begin
        sync(self.device)
        if self.case.restore:
            self.case.restore(self.sets[0])
        return min(seconds, LONGEST_WAIT)

    def _add_graph(self, name: str, run: Variant) -> None:
        if not (self.case.graph and name.startswith(("kvcompress", *self.case.captured))):
            return
        title = f"{name}, in a graph"
        try:
            self.graphs[title] = self._capture(run)
        except Exception as error:
            if name.startswith("kvcompress"):
                raise
            self.failed[title] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def _capture(self, run: Variant) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for inputs in self.sets[: self.inner]:
                run(inputs)
        return graph

    def names(self) -> list[str]:
        return [*self.variants, *self.graphs]

    def time(self, name: str) -> float:
        """Seconds a call of one variant, over one round: every set of inputs once, each cold."""
        if self.flush:
            self.flush()
        if name in self.graphs:
            return once(self.graphs[name].replay, self.device, 1) / self.inner
        run = self.variants[name]

        def call() -> None:
            run(self.sets[self.turn % len(self.sets)])
            self.turn += 1

        seconds = once(call, self.device, self.inner, self.queueing.get(name, 0.0))
        if self.case.restore:
            self.case.restore(self.sets[(self.turn - 1) % len(self.sets)])
        return seconds


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and best of the rounds, in seconds."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {
        "median": statistics.median(samples),
        "low": quartiles[0],
        "high": quartiles[2],
        "best": min(samples),
    }


def warmed(case: Case) -> Case:
    """The case with all its reads from the cache, as far as they fit it."""
    passes = case.passes or [Work(case.read, case.written, case.flop, case.exponentials)]
    return replace(case, passes=[replace(one, cached=True) for one in passes])


def chosen(cases: Iterable[Case], ops: Sequence[str], label: str | None, core: bool) -> list[Case]:
    """The cases asked for: of ops whose names contain one of these, or of all."""
    return [
        case
        for case in cases
        if (not ops or any(op in case.op for op in ops))
        and (label is None or label in case.label)
        and (case.core or not core)
    ]
