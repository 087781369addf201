"""Error of the attention's output without any task: the first thing to look at when a method is new."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from kvcompress.attend import attend
from kvcompress.evaluate.reading import Reading
from kvcompress.models import CompressedCache
from kvcompress.models.layer import CompressedLayer

__all__ = ["attention_error"]


def attention_error(reading: Reading, caches: Sequence[CompressedCache], following: Sequence[int]) -> Tensor:
    """How far a compressed cache turns what attention gives, for the real queries of the tokens that follow the prompt.

    ``error[l, h] = |A - A'|_F / |A|_F`` with ``A = softmax(scale Q K^T) V`` of query head h in layer l over the whole cache and
    ``A'`` over the kept entries; Q are the queries of the next tokens as the model with the full cache makes them, and both
    see the tokens' own K and V. Errors of earlier layers are not passed on: each layer is looked at alone.

    Args:
        reading: one prompt, made with ``queries >= len(following)``; it stays as it is.
        caches: compressed from that reading; they are not changed.
        following: the next tokens.

    Returns:
        ``[len(caches), layers, num_q_heads]`` float32, of the layers that attend in full.
    """
    [seen], new = reading.lengths, len(following)
    ahead = reading.extended(following)
    errors = []
    for layer_idx in ahead.layers:
        scale = ahead.softmax_scale(layer_idx)
        queries, keys, values = ahead.layer(layer_idx)
        if queries.shape[2] < new:
            raise ValueError(
                f"attention_error: reading must keep at least {new} queries, as there are next tokens, got {queries.shape[2]}"
            )
        queries = queries[:, :, -new:]
        full = attend(queries, keys, values, softmax_scale=scale).float()
        row = []
        for cache in caches:
            layer = cache.layers[layer_idx]
            assert isinstance(layer, CompressedLayer)
            assert layer.store is not None
            store = deepcopy(layer.store)
            store.append(keys[:, :, seen:], values[:, :, seen:])
            got = store.attend(queries, softmax_scale=scale).float()
            row.append((full - got).norm(dim=(2, 3)) / full.norm(dim=(2, 3)))
        errors.append(torch.cat(row))
    return torch.stack(errors, 1)
