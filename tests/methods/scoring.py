"""One check for scores of keys and values: against a plain float64 reference, row by row, beside poisoned padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvcompress.layer import LayerState
from tests.reference.rotary import rope

LENGTHS = [70, 70, 33, 1]  # one full row, its twin in size, an odd one, a single token
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layer(
    lengths: list[int],
    *,
    dtype: torch.dtype,
    device: str,
    q_heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    index: int = 0,
) -> LayerState:
    """Rotated queries and keys with a mean and heavy rows; padded columns hold values that would show in any statistic."""
    batch, seq_len = len(lengths), max(lengths)
    inv_freq = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
    queries, keys, values = (
        torch.randn(batch, heads, seq_len, dim, device=device) + torch.randn(heads, 1, dim, device=device)
        for heads in (q_heads, kv_heads, kv_heads)
    )
    keys *= torch.rand(batch, kv_heads, seq_len, 1, device=device) + 0.5
    values *= torch.rand(batch, kv_heads, seq_len, 1, device=device) + 0.5
    for b, length in enumerate(lengths):
        start = seq_len - length
        positions = torch.arange(seq_len, device=device) - start
        queries[b], keys[b] = rope(queries[b], positions, inv_freq), rope(keys[b], positions, inv_freq)
        for t in (queries, keys, values):
            t[b, :, :start] = 1e4
    starts = torch.tensor([seq_len - n for n in lengths], dtype=torch.int32, device=device)
    return LayerState(
        index, 4, queries.to(dtype), keys.to(dtype), values.to(dtype), lengths, dim**-0.5,
        starts if min(lengths) < seq_len else None, inv_freq=inv_freq,
    )  # fmt: skip


def widened(state: LayerState, b: int, dtype: torch.dtype) -> LayerState:
    """Row b alone, copied, in another dtype."""
    cut = state.seq_len - state.lengths[b]
    q, k, v = (t[b : b + 1, :, cut:].to(dtype).clone() for t in (state.queries, state.keys, state.values))
    return replace(state, queries=q, keys=k, values=v, lengths=[state.lengths[b]], seq_start=None)


def check(
    score: Callable[[LayerState], Tensor],
    reference: Callable[[LayerState], Tensor],
    state: LayerState,
    *,
    roundings: float = 4,
) -> None:
    """Scores of `state` against ``reference`` of each row alone in float64: at most twice the error of float32.

    `reference` computes in the dtype of the layer it is given. Entries at +inf must be the same ones. `roundings` of the
    largest score come on top: more where one float32 run says little, as with exponentials of large numbers.
    """
    scores = score(state)
    batch, heads = state.keys.shape[:2]
    assert scores.shape == (batch, heads, state.seq_len)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, score(state))  # run to run, to the bit
    for b, length in enumerate(state.lengths):
        cut = state.seq_len - length
        assert torch.isneginf(scores[b, :, :cut]).all()
        exact = reference(widened(state, b, torch.float64))[0]
        plain = reference(widened(state, b, torch.float32))[0]
        ours = scores[b, :, cut:].double()
        finite = exact.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        assert torch.equal(ours[~finite], exact[~finite])
        error = (ours - exact)[finite].abs().max() if finite.any() else torch.zeros(())
        allowed = (plain.double() - exact)[finite].abs().max() if finite.any() else torch.zeros(())
        scale = exact[finite].abs().max() if finite.any() else torch.ones(())
        assert error <= 2 * allowed + roundings * torch.finfo(torch.float32).eps * scale, (
            b,
            float(error),
            float(allowed),
        )
        alone = score(state.row(b))[0]  # the same arithmetic on the same numbers
        assert torch.equal(scores[b, :, cut:], alone) or state.seq_start is None
