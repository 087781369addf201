"""The draft of a method that looks ahead: a few greedy tokens over a temporary cache, of which only the queries stay."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from kvcompress.models.cache import CompressedCache
from kvcompress.models.layer import CompressedLayer
from kvcompress.models.rows import Rows
from kvcompress.pipeline import Pipeline, Stages

__all__ = ["look_ahead"]


class _Draft(CompressedCache):
    """A cut copy of a cache whose prompt is whole, which remembers the queries of what is decoded over it."""

    def __init__(self, whole: CompressedCache, config: Any, stages: Stages, room: int) -> None:
        super().__init__(config, None, reserve=room)
        self.queries: dict[int, list[Tensor]] = {}
        pipeline = Pipeline(stages, len(self._compressed), reserve=room)
        for layer_idx, layer in enumerate(whole.layers):
            if isinstance(layer, CompressedLayer):
                self._layer(layer_idx).adopt(layer, pipeline)
            else:
                self.layers[layer_idx] = copy.deepcopy(layer)
        self._pipeline = pipeline

    def attend(self, layer_idx: int, query: Tensor, rows: Rows | None, *args: Any, **kwargs: Any) -> Tensor:
        self.queries.setdefault(layer_idx, []).append(query.clone())
        return super().attend(layer_idx, query, rows, *args, **kwargs)


def look_ahead(model: Any, cache: CompressedCache, inputs: dict[str, Any], name: str) -> None:
    """Drafts from the token that is about to be decoded, and hands the queries to the layers of `cache`.

    Args:
        model: attached.
        cache: holds the whole prompt, nothing cut.
        inputs: keyword arguments of the forward to come: one token a row.
        name: which of them is the cache.
    """
    stages = cache.lookahead
    assert stages is not None
    tokens = inputs.get("input_ids")
    if tokens is None:
        raise NotImplementedError(
            f"CompressedCache: {cache.method} drafts tokens, so the model must be given input_ids"
        )
    mask, position = inputs.get("attention_mask"), inputs.get("position_ids")
    config = model.config
    draft = _Draft(cache, config, stages.draft, room=stages.tokens)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = torch.tensor([] if ends is None else ends, device=tokens.device).flatten()
    lengths = [0] * tokens.shape[0]
    going = [True] * tokens.shape[0]
    others = {key: t for key, t in inputs.items() if key not in ("input_ids", "attention_mask", "position_ids", name)}
    for _ in range(stages.tokens):
        out = model(input_ids=tokens, attention_mask=mask, position_ids=position, **{name: draft}, **others)
        lengths = [n + on for n, on in zip(lengths, going)]
        tokens = out.logits[:, -1:].argmax(-1)
        ended = torch.isin(tokens[:, 0], ends).tolist()
        going = [on and not end for on, end in zip(going, ended)]
        if not any(going):
            break
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        if position is not None:
            position = position + 1
    cache.take_lookahead({i: torch.cat(parts, 2) for i, parts in draft.queries.items()}, lengths)
