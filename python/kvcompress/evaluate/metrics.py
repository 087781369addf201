"""From records to figures: accuracy with its confidence interval, entries, bytes and times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from kvcompress.evaluate.runner import Record

__all__ = ["bootstrap", "means", "paired", "summarise", "wilson"]

_Z = 1.959964  # two-sided 95 %
_RESAMPLES = 2000


def wilson(right: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of `right` in `n`, by Wilson's score.

    Example:
        >>> [round(bound, 3) for bound in wilson(9, 10)]
        [0.596, 0.982]
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, _Z**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(groups: Sequence[Sequence[Sequence[float]]], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean over groups (tasks) of the mean over their clusters (contexts with their questions).

    Clusters are drawn anew within each group, because questions on one context are not independent.
    """
    random = np.random.default_rng(seed)
    total = np.zeros(_RESAMPLES)
    for group in groups:
        sums = np.array([sum(cluster) for cluster in group], dtype=np.float64)
        sizes = np.array([len(cluster) for cluster in group], dtype=np.float64)
        drawn = random.integers(0, len(group), (_RESAMPLES, len(group)))
        total += sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(total / len(groups), [0.025, 0.975])
    return float(low), float(high)


def summarise(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One run a method, budget, task, length and mode, in order of appearance.

    Times are the best of the timed samples; `entries`, `bytes` and `kept` (the share of the prompt) are means.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        key = (r.method, r.parameters, r.budget, r.task, r.length, r.question_visible)
        groups.setdefault(key, []).append(r)
    runs = []
    for (method, parameters, budget, task, length, visible), own in groups.items():
        right = sum(r.right for r in own)
        low, high = wilson(right, len(own))
        runs.append(
            {
                "method": method,
                "parameters": parameters,
                "budget": budget,
                "task": task,
                "length": length,
                "question_visible": visible,
                "accuracy": right / len(own),
                "low": low,
                "high": high,
                "n": len(own),
                "tokens_right": sum(r.tokens_right for r in own) / sum(r.tokens for r in own),
                "agreement": sum(r.agreement * r.tokens for r in own) / sum(r.tokens for r in own),
                "kl": sum(r.kl * r.tokens for r in own) / sum(r.tokens for r in own),
                "perplexity": _perplexity(own),
                **_sizes(own),
            }
        )
    return runs


def means(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One line a method, budget, length and mode: the mean over tasks, each counting the same, and its interval."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        groups.setdefault((r.method, r.parameters, r.budget, r.length, r.question_visible), []).append(r)
    lines = []
    for (method, parameters, budget, length, visible), own in groups.items():
        tasks: dict[str, dict[str, list[Record]]] = {}
        for r in own:
            tasks.setdefault(r.task, {}).setdefault(r.context_id, []).append(r)
        clusters = [[[float(r.right) for r in rows] for rows in task.values()] for task in tasks.values()]
        accuracy = fmean(fmean(x for rows in task for x in rows) for task in clusters)
        low, high = _interval(accuracy, clusters)
        lines.append(
            {
                "method": method,
                "parameters": parameters,
                "budget": budget,
                "length": length,
                "question_visible": visible,
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "n": len(own),
                "tasks": len(tasks),
                "agreement": fmean(r.agreement for r in own),
                "kl": fmean(r.kl for r in own),
                "perplexity": _perplexity(own),
                **_sizes(own),
            }
        )
    return lines


def _interval(accuracy: float, clusters: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """The 95 % interval of a mean over tasks: by the bootstrap over contexts where it has something to draw from.

    One task, a task with one context, and answers that are all right or all wrong give it no spread, which would pass for
    certainty: there it is Wilson's, at the number of questions that a mean of equally weighted tasks is worth.
    """
    if len(clusters) > 1 and all(len(task) > 1 for task in clusters) and 0 < accuracy < 1:
        return bootstrap(clusters)
    n = len(clusters) ** 2 / sum(1 / sum(map(len, task)) for task in clusters)
    return wilson(accuracy * n, n)


def paired(a: Iterable[Record], b: Iterable[Record]) -> list[dict[str, Any]]:
    """Two sets of records on the samples that both have, for each pair of methods with the same budget, length and mode.

    `difference` is the mean over tasks of B right minus A right, with its bootstrap interval over contexts: pairing takes the
    samples' own difficulty out, so that it tells smaller differences than two separate intervals do.
    """
    sides: list[dict[tuple[Any, ...], dict[str, dict[str, Record]]]] = [{}, {}]
    for side, records in zip(sides, (a, b)):
        for r in records:
            side.setdefault((r.budget, r.length, r.question_visible), {}).setdefault(r.method, {})[r.id] = r
    lines = []
    for key in (key for key in sides[0] if key in sides[1]):
        names = set(sides[0][key]) & set(sides[1][key])
        pairs = [(n, n) for n in names] or [(x, y) for x in sides[0][key] for y in sides[1][key]]
        for left, right in sorted(pairs):
            one, other = sides[0][key][left], sides[1][key][right]
            tasks: dict[str, dict[str, list[float]]] = {}
            shared = [name for name in one if name in other]
            for name in shared:
                gain = float(other[name].right) - float(one[name].right)
                tasks.setdefault(one[name].task, {}).setdefault(one[name].context_id, []).append(gain)
            if not shared:
                continue
            clusters = [list(task.values()) for task in tasks.values()]
            alone = any(len(task) == 1 for task in clusters)  # nothing to draw from within such a task
            low, high = bootstrap([[rows for task in clusters for rows in task]] if alone else clusters)
            budget, length, visible = key
            lines.append(
                {
                    "a": left,
                    "b": right,
                    "budget": budget,
                    "length": length,
                    "question_visible": visible,
                    "n": len(shared),
                    "a_accuracy": fmean(one[name].right for name in shared),
                    "b_accuracy": fmean(other[name].right for name in shared),
                    "difference": fmean(fmean(x for rows in task for x in rows) for task in clusters),
                    "low": low,
                    "high": high,
                    "gained": sum(other[name].right and not one[name].right for name in shared),
                    "lost": sum(one[name].right and not other[name].right for name in shared),
                }
            )
    return lines


def _sizes(own: Sequence[Record]) -> dict[str, Any]:
    return {
        "entries": fmean(r.entries for r in own),
        "kept": fmean(r.entries / r.prompt_tokens for r in own),
        "end_entries": fmean(r.end_entries for r in own),
        "bytes": round(fmean(r.bytes for r in own)),
        "prompt_tokens": fmean(r.prompt_tokens for r in own),
        **{name: _best(own, name) for name in ("prefill_s", "compress_s", "decode_s")},
        "scorer": own[0].scorer,
    }


def _perplexity(own: Sequence[Record]) -> float:
    """Of the answers' tokens; capped at what a float holds."""
    return math.exp(min(700.0, sum(r.nll * r.tokens for r in own) / sum(r.tokens for r in own)))


def _best(own: Sequence[Record], name: str) -> float | None:
    return min((value for r in own if (value := getattr(r, name)) is not None), default=None)
