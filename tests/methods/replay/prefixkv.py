"""PrefixKV: the budgets, and the rows that are kept at the end of the prefill.

Budgets: the official search stops within 5 entries of the total and is then rescaled and truncated. Its two results are replayed
from our curves; our own budgets are prefixes of the same curves that meet the total, so they differ from the search's all in one
direction, by what it missed.

Not replayed yet: the decode steps (`final_keys_*`, `decode_evict_slot`, `distance`, `steps`), which drop entries at a fixed slot.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvcompress.budget import PrefixMass, cumulative_mass, mass_before
from kvcompress.layer import LayerState
from kvcompress.methods import create
from kvcompress.pipeline import Pipeline
from tests.methods.golden import Golden

TOLERANCE = 5  # of the official search, in entries


def replay(case: Golden) -> None:
    if "score_sum" in case.tensors:
        budgets(case)
    else:
        eviction(case)


def budgets(case: Golden) -> None:
    scores = case["score_sum"]
    layers, length = scores.shape
    assert (case.take("layers"), case.take("seq_len")) == (layers, length)
    ratio, forced = case.take("ratio"), case.take("start_size") + case.take("protect_size")
    target = layers * length * ratio
    assert abs(case.take("target") - target) < 1e-6
    held = cumulative_mass(scores)

    through = [np.append(mass_before(line, length), 1.0)[1:] for line in held]  # each entry counted in
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        first = [int(np.searchsorted(curve, middle, side="left")) for curve in through]
        dropped = [max(0, length - (i + 1) - forced) for i in first]
        if abs(sum(dropped) - target) < TOLERANCE:
            break
        low, high = (low, middle) if sum(dropped) < target else (middle, high)
    assert dropped == case["forget_raw"].tolist()
    rescaled = [int(n * target / sum(dropped)) for n in dropped]
    assert rescaled == case["forget"].tolist()
    assert torch.equal(torch.tensor(rescaled).double() / length, case["ratios"])

    mean = length - round(ratio * length)
    settled = PrefixMass(mean, forced).settle(list(held[:, None]), [length], floor=forced)
    ours = [length - row[0] for row in settled]
    assert sum(ours) == layers * (length - mean)
    assert sum(abs(a - b) for a, b in zip(ours, dropped)) == abs(sum(ours) - sum(dropped))


@dataclass(frozen=True)
class Given:
    """Scores that the case brings, for every head."""

    scores: Tensor
    by_position = False
    queries = 0

    def __call__(self, layer: LayerState) -> Tensor:
        return self.scores[layer.index][:, None].expand(-1, layer.keys.shape[1], -1)


def eviction(case: Golden) -> None:
    case.ignore("distance", "steps")
    length, layers = case.take("seq_len"), case.take("layers")
    keys, values = case["keys"][:, :, :, :length], case["values"][:, :, :, :length]
    keep = (1 - case["ratios"]).tolist()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"keep": keep}, file)
        file.flush()
        method = create(
            "prefixkv",
            budget=sum(keep) / layers,
            sink=case.take("start_size"),
            window=case.take("protect_size"),
            table=file.name,
        )
        stages = method.stages()
    scores = case["attention"].mean(2).sum(2)  # over heads, then queries
    pipeline = Pipeline(replace(stages, score=Given(scores)), layers)
    for index in range(layers):
        state = LayerState(index, layers, None, keys[index], values[index], [length] * keys.shape[1], 1.0)
        store = pipeline.compress(state)
        for stored, name in zip(store.view(), ("keys", "values")):
            assert torch.equal(stored, case[f"prefill_{name}_{index}"])
