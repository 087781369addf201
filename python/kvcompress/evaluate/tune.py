"""The guarantee mode: the smallest cache whose loss stays under a bound, over methods, budgets and layer splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvcompress.evaluate.metrics import means
from kvcompress.evaluate.runner import Candidate, Record, evaluate
from kvcompress.evaluate.tasks import Sample
from kvcompress.methods import Method

__all__ = ["SHARES", "Point", "pareto", "tune"]

# Shares of the prompt that are tried, about a factor of 1.35 apart: finer steps are below what calibration sets can tell.
SHARES = (0.8, 0.6, 0.45, 0.33, 0.25, 0.18, 0.13, 0.1, 0.075, 0.055, 0.04, 0.03)

Metric = Literal["accuracy", "kl"]


@dataclass(frozen=True)
class Point:
    """One method at one budget on the calibration questions.

    Attributes:
        name: as the candidate was named.
        method: None is the full cache.
        budget: share of the prompt.
        loss: by how much accuracy falls below the full cache's, or the mean KL from it.
        accuracy, low, high: mean over tasks and its 95 % interval.
        kept, bytes: what the cache held after the cut.
        n: questions.
    """

    name: str
    method: Method | None
    budget: float
    loss: float
    accuracy: float
    low: float
    high: float
    kept: float
    bytes: int
    n: int


def tune(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    make: Callable[[str, float], Method],
    names: Sequence[str],
    *,
    max_loss: float,
    metric: Metric = "accuracy",
    question_visible: bool = False,
    batch: int | None = None,
    on_round: Callable[[int], None] = lambda _: None,
    on_step: Callable[[int], None] = lambda _: None,
) -> tuple[Point | None, list[Point]]:
    """Searches, for every method at once, the smallest share of `SHARES` with ``loss <= max_loss``.

    The loss is taken to grow as the share falls, so that a binary search of 4 rounds finds the border; each round reads
    every prompt once for all methods.

    Args:
        model, tokenizer, samples: see `evaluate`.
        make: builds a method from a name and a share.
        names: the methods.
        max_loss: the bound.
        metric: "accuracy" or "kl".
        question_visible: which of the two ways of asking.
        batch: see `evaluate`.
        on_round: is called with the number of measurements that the next round will make.
        on_step: see `evaluate`.

    Returns:
        The smallest point under the bound (None: not even the largest share is), and all points, the full cache first.
    """
    borders = {name: (-1, len(SHARES)) for name in names}  # the last share that is good enough, the first that is not
    points: list[Point] = []
    full: float | None = None
    while True:
        asked = {name: (good + bad) // 2 for name, (good, bad) in borders.items() if bad - good > 1}
        if not asked:
            break
        candidates = [] if full is not None else [Candidate("full", None)]
        built = {name: make(name, SHARES[place]) for name, place in asked.items()}
        candidates += [Candidate(name, built[name], SHARES[place]) for name, place in asked.items()]
        on_round(len(candidates) * len(samples))
        records = list(
            evaluate(
                model, tokenizer, samples, candidates,
                question_visible=[question_visible], batch=batch, on_step=on_step,
            )
        )  # fmt: skip
        lines = {line["method"]: line for line in means([_one_length(r) for r in records])}
        for candidate in candidates:
            line = lines[candidate.name]
            full = line["accuracy"] if full is None else full
            loss = line["kl"] if metric == "kl" else full - line["accuracy"]
            points.append(
                Point(
                    candidate.name, candidate.method, float(candidate.budget), loss,
                    *(line[name] for name in ("accuracy", "low", "high", "kept", "bytes", "n")),
                )
            )  # fmt: skip
            if candidate.method is not None:
                good, bad = borders[candidate.name]
                place = asked[candidate.name]
                borders[candidate.name] = (place, bad) if loss <= max_loss else (good, place)
    allowed = [p for p in points if p.method is not None and p.loss <= max_loss]
    return min(allowed, key=lambda p: (p.bytes, p.loss), default=None), points


def _one_length(record: Record) -> Record:
    return replace(record, length=0)  # calibration sets of several lengths count together


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both bytes and loss, smallest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front
