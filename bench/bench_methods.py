"""Whole methods: the compression of one layer's prompt by each method of the registry, all its stages."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case
from kvcompress import methods
from kvcompress.layer import LayerState
from kvcompress.pipeline import Pipeline
from tests.cases import LAYER

LAYERS = 2  # budgets over layers need more than one
BUDGET = 1024


def cases(device: torch.device, *, quick: bool = False, method: str | None = None) -> Iterator[Case]:
    lengths = [2048 if device.type == "cpu" else 8192] if quick or device.type == "cpu" else [8192, 32768]
    for name in methods.available():
        if method is None or name == method:
            for length in lengths:
                yield method_case(device, name, length)


def method_case(device: torch.device, name: str, length: int) -> Case:
    heads, dim = LAYER.num_kv_heads, LAYER.head_dim
    budget = min(BUDGET, length // 4)
    stages = methods.create(name, budget=budget).stages()
    queries = min(length, max(1, Pipeline(stages, LAYERS).queries))

    def make() -> list[LayerState]:
        inv_freq = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)

        def rows(count: int, n: int) -> torch.Tensor:
            return torch.randn(1, count, n, dim, device=device, dtype=torch.bfloat16)

        return [
            LayerState(
                index, LAYERS, rows(LAYER.num_q_heads, queries), rows(heads, length), rows(heads, length), [length],
                dim**-0.5, inv_freq=inv_freq,
            )
            for index in range(LAYERS)
        ]  # fmt: skip

    def run(layers: list[LayerState]) -> None:
        pipeline = Pipeline(stages, LAYERS)
        for layer in layers:
            pipeline.compress(layer)
            if pipeline.wants_residual:
                pipeline.observe_residual(layer.index, torch.full((1,), 0.5 + 0.1 * layer.index, device=device))

    kept = 2 * heads * budget * dim * 2
    return Case(
        op=f"method {name}",
        label=f"{LAYERS} layers, B1 S{length} k {budget}",
        make=make,
        variants={"kvcompress": run},
        read=LAYERS * kept,
        written=LAYERS * kept,
        footprint=LAYERS * 2 * heads * length * dim * 2,
        notes="moving the kept entries alone",
        params={"method": name, "seq_len": length, "k": budget, "layers": LAYERS, "queries": queries},
    )
