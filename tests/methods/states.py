"""Layers to compress, for the tests of methods: seeded, with left padding, and each row as a batch of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvcompress.cache import DenseStore
from kvcompress.layer import LayerState
from kvcompress.methods import Method
from kvcompress.pipeline import Pipeline

LENGTHS = [90, 90, 41, 1]  # a full row, its twin in size, a short one, a single token
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def prompt(
    lengths: Sequence[int],
    *,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    index: int = 0,
    num_layers: int = 1,
) -> LayerState:
    """A layer's prompt, row b left padded to the longest; padding holds large numbers that must not leak."""
    batch, seq_len = len(lengths), max(lengths)
    starts = torch.tensor([seq_len - n for n in lengths], dtype=torch.int32)
    pad = torch.arange(seq_len) < starts[:, None]

    def rows(heads: int) -> Tensor:
        x = 1.5 * torch.randn(batch, heads, seq_len, head_dim)  # peaked enough to rank
        return x.masked_fill(pad[:, None, :, None], 40.0).to(device, dtype)

    return LayerState(
        index,
        num_layers,
        rows(num_q_heads),
        rows(num_kv_heads),
        rows(num_kv_heads),
        list(lengths),
        head_dim**-0.5,
        seq_start=starts.to(device) if min(lengths) < seq_len else None,
    )


def alone(layer: LayerState, row: int) -> LayerState:
    """Row `row` of a padded batch as a batch of its own."""
    real = slice(layer.seq_len - layer.lengths[row], None)
    tensors = (t[row : row + 1, :, real] for t in (layer.queries, layer.keys, layer.values))
    return LayerState(layer.index, layer.num_layers, *tensors, [layer.lengths[row]], layer.softmax_scale)


def attention(layer: LayerState, window: int | None = None) -> Tensor:
    """Causal attention of the last `window` queries of an unpadded layer: ``[batch, num_q_heads, window, seq_len]``."""
    queries = layer.queries if window is None else layer.queries[:, :, -window:]
    keys = layer.keys.repeat_interleave(queries.shape[1] // layer.keys.shape[1], 1)
    logits = queries @ keys.mT * layer.softmax_scale
    position = torch.arange(layer.seq_len, device=queries.device)
    return logits.masked_fill(position > position[-queries.shape[2] :, None], -torch.inf).softmax(-1)


def compress(method: Method, layer: LayerState) -> DenseStore:
    return Pipeline(method.stages(), 1).compress(layer)


def kept(store: DenseStore, row: int = 0) -> Tensor:
    """Kept positions ``[heads, length]`` of a row."""
    return store.positions[row, :, : store.lengths[row]]


def assert_padded_rows_equal_those_rows_alone(method: Method, layer: LayerState) -> None:
    together = compress(method, layer)
    for row in range(len(layer.lengths)):
        single = compress(method, alone(layer, row))
        assert together.lengths[row] == single.lengths[0], row
        assert torch.equal(kept(together, row), kept(single)), row


def assert_scores(
    score: Callable[[LayerState], Tensor],
    reference: Callable[..., Tensor],
    layer: LayerState,
    given: Callable[[int], dict[str, Tensor]] = lambda row: {},
) -> None:
    """Scores against ``reference`` of each row alone, in float64: twice the error of plain float32, and the rounding of a dot.

    A running dot product is rounded once a step, by up to eps / 2 of what it holds: as a random walk about
    ``eps / 2 * sum |q_d k_d|``; a logit and the log-sum-exp bring one each to the exponent. `reference` takes an unpadded
    layer, and what is `given` for its row of the batch, and computes in the layer's dtype. Entries at +inf must be the same ones, padding is -inf, two runs agree to the bit.
    """
    scores = score(layer)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, score(layer))
    for row, length in enumerate(layer.lengths):
        start = layer.seq_len - length
        assert torch.isneginf(scores[row, :, :start]).all()
        ours = scores[row, :, start:].double()
        single = alone(layer, row)
        exact, plain = (
            reference(widened(single, dtype), **given(row))[0].double() for dtype in (torch.float64, torch.float32)
        )
        finite = exact.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        assert torch.equal(ours[~finite], exact[~finite])
        if finite.any():
            repeats = single.queries.shape[1] // single.keys.shape[1]
            keys = single.keys.double().abs().repeat_interleave(repeats, 1)
            walk = (single.queries.double().abs() @ keys.mT).max() * single.softmax_scale
            rounding = torch.finfo(torch.float32).eps * exact[finite].abs().max() * (4 + walk)
            error, plain_error = ((x - exact)[finite].abs().max() for x in (ours, plain))
            assert error <= 2 * plain_error + rounding, (
                f"row {row}: {error:.3g} against {plain_error:.3g} + {rounding:.3g}"
            )


def widened(layer: LayerState, dtype: torch.dtype) -> LayerState:
    return replace(layer, queries=layer.queries.to(dtype), keys=layer.keys.to(dtype), values=layer.values.to(dtype))
