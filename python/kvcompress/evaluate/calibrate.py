"""Calibration: what is measured once for a model and then used for every prompt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kvcompress import score
from kvcompress.budget import cosine_importance
from kvcompress.calibrated import fit_quality
from kvcompress.evaluate.reading import Reading
from kvcompress.evaluate.runner import Candidate, Record, evaluate
from kvcompress.evaluate.tasks import Sample, encode
from kvcompress.layer import LayerState
from kvcompress.methods import Method, create
from kvcompress.methods.baklava import BaklavaLike, CacheTable
from kvcompress.models import attach

__all__ = [
    "HeadChange",
    "Trial",
    "contexts",
    "fit_curve",
    "halves",
    "head_change",
    "load_curve",
    "prompts_hash",
    "save_curve",
    "search_table",
]

GAMMAS, BETAS = (0.5, 1.0, 2.0, 4.0), (0.1, 0.25, 0.5)  # beside gamma 0, the uniform budget, where beta changes nothing

Step = Callable[[int], None]


def contexts(samples: Sequence[Sample], tokenizer: Any) -> list[list[int]]:
    """The token ids of the samples' different contexts, in their order."""
    own = {sample.context_id: sample for sample in reversed(samples)}
    return [encode(sample, tokenizer).context for sample in reversed(own.values())]


def prompts_hash(prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the token ids: which prompts a profile was made from."""
    return hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()


@dataclass(frozen=True)
class HeadChange:
    """How much attention changes what enters it.

    Attributes:
        heads: ``[layers][kv heads]``, ``1 - cos`` of a token's value and its attention output, in [0, 2].
        layers: ``1 - cos`` of the residual stream before and behind the attention block, one a layer.
    """

    heads: tuple[tuple[float, ...], ...]
    layers: tuple[float, ...]

    def importance(self, layer_factor: bool) -> tuple[tuple[float, ...], ...]:
        """What a `CacheTable` takes: the heads' change, times each layer's own over the mean layer's if asked for."""
        mean = sum(self.layers) / len(self.layers)
        factors = [x / mean if layer_factor and mean > 0 else 1.0 for x in self.layers]
        return tuple(tuple(e * factor for e in row) for row, factor in zip(self.heads, factors))


@torch.inference_mode()
def head_change(model: Any, prompts: Sequence[Sequence[int]], *, on_step: Step = lambda _: None) -> HeadChange:
    """Profiles a model on prompts with its full cache, in float32, mean over tokens and prompts.

    The first token is left out for the heads: there the output is the value. Query heads count equally within their kv head.
    """
    heads: list[torch.Tensor] = []
    layers: list[torch.Tensor] = []
    read = [ids for ids in prompts if len(ids) > 1]
    if not read:
        raise ValueError(f"head_change: prompts must have at least 2 tokens, got {[len(ids) for ids in prompts]}")
    weight = torch.tensor([len(ids) - 1 for ids in read], dtype=torch.float64)
    weight /= weight.sum()
    watched = create("squeeze_attention", budget=1.0)  # it asks for the residual stream
    with attach(model):
        for ids in read:
            reading = Reading(model, ids, [watched], queries=len(ids))
            heads.append(torch.stack([_change(reading, i) for i in reading.layers]).double().cpu())
            layers.append(torch.stack([_turn(reading, i) for i in reading.layers]).double().cpu())
            on_step(1)
    rows = torch.einsum("p,plh->lh", weight, torch.stack(heads)).clamp_min(0).tolist()
    turns = torch.einsum("p,pl->l", weight, torch.stack(layers)).clamp_min(0).tolist()
    return HeadChange(tuple(tuple(row) for row in rows), tuple(turns))


def _change(reading: Reading, layer_idx: int) -> torch.Tensor:
    """``[kv heads]`` of one layer and prompt."""
    queries, keys, values = reading.layer(layer_idx)
    number, scale = len(reading.layers), reading.softmax_scale(layer_idx)
    state = LayerState(reading.layers.index(layer_idx), number, queries, keys, values, [keys.shape[2]], scale)
    output = score.attention_output(state, queries)[0].unflatten(1, (keys.shape[1], -1))
    cosine = F.cosine_similarity(output[:, :, :, 1:].float(), values[:, :, None, 1:].float(), dim=-1, eps=1e-8)
    return (1 - cosine).mean((0, 2, 3))


def _turn(reading: Reading, layer_idx: int) -> torch.Tensor:
    before, update = reading.stream(layer_idx)
    return 1 - cosine_importance(before, update, is_update=True)[0]


@dataclass(frozen=True)
class Trial:
    """One pair of parameters of `search_table` and what held-out text said of it."""

    gamma: float
    beta: float
    nll: float


def search_table(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    importance: tuple[tuple[float, ...], ...],
    *,
    budget: int | float,
    inner: str = "snapkv",
    batch: int | None = None,
    on_step: Step = lambda _: None,
) -> tuple[CacheTable, list[Trial]]:
    """The (gamma, beta) under which the answers of held-out samples are likeliest, and all trials, best first.

    The context alone is compressed. The uniform budget is among the trials and wins ties, so that on these samples the
    result is never worse.

    Args:
        samples: none of those whose contexts gave `importance`.
        budget: mean entries a cache at which the table is tuned.
        inner: the method that ranks inside a cache.
    """
    pairs = [(0.0, 1.0), *((gamma, beta) for gamma in GAMMAS for beta in BETAS)]
    tables = {f"{gamma} {beta}": CacheTable(importance, gamma, beta) for gamma, beta in pairs}
    candidates = [
        Candidate(name, BaklavaLike(budget=budget, table=table, inner=inner), budget) for name, table in tables.items()
    ]
    records = evaluate(model, tokenizer, samples, candidates, question_visible=[False], batch=batch, on_step=on_step)
    nll = {name: _Mean() for name in tables}
    for record in records:
        nll[record.method].add(record.nll, record.tokens)
    trials = [Trial(tables[name].gamma, tables[name].beta, mean.value) for name, mean in nll.items()]
    trials.sort(key=lambda trial: trial.nll)  # stable: uniform stands first
    return CacheTable(importance, trials[0].gamma, trials[0].beta), trials


class _Mean:
    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, x: float, count: int) -> None:
        self.sum, self.count = self.sum + x * count, self.count + count

    @property
    def value(self) -> float:
        return self.sum / self.count if self.count else math.inf


# --- the quality curve (Compactor)

_CURVE = "kvcompress quality curve 1"


@torch.inference_mode()
def fit_curve(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    make: Callable[[float], Method],
    shares: Sequence[float],
    *,
    caution: float = 3.0,
    batch: int | None = None,
    on_step: Step = lambda _: None,
) -> tuple[float, float, list[tuple[float, float, float]]]:
    """(alpha, beta) of `predicted_quality` for a model and method, and the triples they were fitted to.

    A triple is the share of entries that were kept, the mean NLL of the context's tokens under the model, and NLL(full) /
    NLL(compressed) of the answer behind it, at most 1; the context alone is compressed.

    Args:
        make: the method at a share.
        shares: at which it is measured.
        caution: see `fit_quality`.
    """
    context_nll = {}
    for sample in samples:
        if sample.context_id not in context_nll:
            context_nll[sample.context_id] = _mean_nll(model, encode(sample, tokenizer).context)
    candidates = [Candidate("full", None), *(Candidate(str(share), make(share), share) for share in shares)]
    records = list(
        evaluate(model, tokenizer, samples, candidates, question_visible=[False], batch=batch, on_step=on_step)
    )
    full = {record.id: record.nll for record in records if record.method == "full"}
    triples = [
        (record.entries / record.prompt_tokens, context_nll[record.context_id], _quality(full[record.id], record))
        for record in records
        if record.method != "full"
    ]
    alpha, beta = fit_quality(*zip(*triples), caution=caution)
    return alpha, beta, triples


def _quality(full: float, record: Record) -> float:
    return min(1.0, full / record.nll) if record.nll > 0 else 1.0


def _mean_nll(model: Any, ids: Sequence[int]) -> float:
    """Mean NLL of all tokens but the first, a piece of the logits at a time."""
    tokens = torch.tensor([list(ids)], device=model.device)
    logits = model(tokens, use_cache=False).logits[0, :-1]
    pieces = zip(logits.split(1024), tokens[0, 1:].split(1024))
    return sum(F.cross_entropy(x.float(), y, reduction="sum").item() for x, y in pieces) / max(1, len(ids) - 1)


def save_curve(path: str | Path, alpha: float, beta: float, **about: Any) -> None:
    """Writes a fitted curve, and what is known about it, as JSON that `load_curve` reads."""
    Path(path).write_text(json.dumps({"format": _CURVE, "alpha": alpha, "beta": beta, **about}, indent=2) + "\n")


def load_curve(path: str | Path) -> tuple[float, float]:
    """(alpha, beta) of a file of `kvcompress calibrate --method compactor`, for `kvcompress.calibrated.Calibrated`.

    Raises:
        ValueError: another file.
    """
    try:
        curve = json.loads(Path(path).read_text())
        if curve["format"] != _CURVE:
            raise ValueError(f'format "{curve["format"]}"')
        return float(curve["alpha"]), float(curve["beta"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"load_curve: path must be a file of `kvcompress calibrate` ({_CURVE}), got {path} ({error})"
        ) from None


def halves(samples: Sequence[Sample], profiled: int) -> tuple[list[Sample], list[Sample]]:
    """Samples of the first `profiled` contexts, and those of all others."""
    first = list(dict.fromkeys(sample.context_id for sample in samples))[:profiled]
    return [s for s in samples if s.context_id in first], [s for s in samples if s.context_id not in first]
