"""Reading: a prompt that the model reads once, to be compressed by any number of methods.

The prompt always attends in full, so what a method is given (K, V, queries, the residual stream) does not depend on the
method. A `Reading` keeps it and hands it to a new `CompressedCache` for every method and budget, through the same two
calls that the model makes; only the attention itself is not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompress.layer import ALL_QUERIES, LayerState
from kvcompress.methods import Method
from kvcompress.models import Attachment, CompressedCache
from kvcompress.models.layer import CompressedLayer
from kvcompress.models.lookahead import look_ahead
from kvcompress.models.rows import Rows
from kvcompress.pipeline import Pipeline, Stages
from kvcompress.when import EveryStep, Prefill

__all__ = ["Reading", "compress_directly", "replayable"]


def replayable(method: Method, config: Any) -> bool:
    """Whether a method needs nothing but what a `Reading` keeps: full-attention layers, cut at the end of the prompt."""
    if method.stages().lookahead is not None:
        return False  # it decodes before it cuts
    cache = CompressedCache(config, method)
    return all(isinstance(layer, CompressedLayer) for layer in cache.layers) and isinstance(
        method.stages().when, (Prefill, EveryStep)
    )


def compress_directly(model: Any, ids: Sequence[int], method: Method | None, *, reserve: int = 0) -> CompressedCache:
    """The cache of a prompt, by the model itself: what a user's own loop does."""
    cache = CompressedCache(model.config, method, reserve=reserve)
    given = torch.tensor([list(ids)], device=model.device)
    logits = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    if cache.lookahead is not None:
        _look_ahead(model, cache, logits[:, -1:].argmax(-1))
    cache.finish_prompt()
    return cache


def _look_ahead(model: Any, cache: CompressedCache, token: Tensor) -> None:
    """The draft of a method that looks ahead, as greedy decoding from the prompt's own logits would begin it."""
    look_ahead(model, cache, {"input_ids": token, "past_key_values": cache, "use_cache": True}, "past_key_values")


class _Recorder(CompressedCache):
    """A full cache that remembers the last queries and the residual stream of all layers."""

    def __init__(self, config: Any, queries: int, residual: bool) -> None:
        super().__init__(config)
        self.limit, self.residual = queries, residual
        self.queries: dict[int, Tensor] = {}
        self.streams: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.scales: dict[int, float] = {}
        self.attachment: Attachment | None = None

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        rows: Rows | None,
        scale: float,
        attachment: Attachment | None,
        attended: Tensor | None = None,
    ) -> Tensor:
        self.attachment, self.scales[layer_idx] = attachment, scale
        held = self.queries.get(layer_idx)
        both = query if held is None else torch.cat([held, query], 2)
        self.queries[layer_idx] = both[:, :, -self.limit :].clone() if self.limit else both[:, :, :0]
        return super().attend(layer_idx, query, rows, scale, attachment, attended)

    def wants_residual(self, layer_idx: int) -> bool:
        return self.residual

    def observe(self, layer_idx: int, before: Tensor, update: Tensor) -> None:
        self.streams.setdefault(layer_idx, []).append((before, update))


class Reading:
    """A model's whole cache of a prompt, and what methods look at besides; the model must be attached.

    Args:
        model: an attached causal LM whose layers all attend in full.
        ids: the prompt.
        methods: which methods will compress it; says how many queries are kept, and whether the residual stream is.
        queries: at least so many queries are kept.
    """

    def __init__(self, model: Any, ids: Sequence[int], methods: Sequence[Method], *, queries: int = 0) -> None:
        self.model = model
        pipelines = [Pipeline(method.stages(), 1) for method in methods]
        wanted = min(ALL_QUERIES, max([queries, *(pipeline.queries for pipeline in pipelines)]))
        residual = any(pipeline.wants_residual for pipeline in pipelines)
        self._cache = _Recorder(model.config, wanted, residual)
        self._scores: dict[Any, Any] = {}  # what is computed once for all budgets
        self._next = torch.zeros(1, 1, dtype=torch.long)
        self.tokens: list[int] = []
        self.read(ids)

    def read(self, ids: Sequence[int]) -> Tensor:
        """The prompt goes on. Returns the logits of these tokens, ``[n, vocabulary]``."""
        self._scores.clear()
        self.tokens.extend(ids)
        tokens = torch.tensor([list(ids)], device=self.model.device)
        logits: Tensor = self.model(tokens, past_key_values=self._cache, use_cache=True).logits[0]
        self._next = logits[None, -1:].argmax(-1)
        return logits

    def mark(self) -> Any:
        """Where the prompt is, for `rewind`."""
        held = {i: t for i, t in self._cache.queries.items()}
        streams = {i: list(pairs) for i, pairs in self._cache.streams.items()}
        return len(self.tokens), held, streams, dict(self._scores), self._next

    def rewind(self, mark: Any) -> None:
        """Forgets what was read since `mark`."""
        tokens, queries, streams, scores, self._next = mark
        self._cache.crop(tokens - len(self.tokens))
        del self.tokens[tokens:]
        self._cache.queries = dict(queries)
        self._cache.streams = {i: list(pairs) for i, pairs in streams.items()}
        self._scores = dict(scores)

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last queries ``[1, num_q_heads, n, head_dim]``, all keys and all values of a layer."""
        layer = self._cache.layers[layer_idx]
        assert isinstance(layer, CompressedLayer), "readings are of models whose layers all attend in full"
        assert layer.store is not None
        return self._cache.queries[layer_idx], *layer.store.view()

    def stream(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """What entered a layer and what its attention added, ``[1, tokens, hidden]``; kept if a method wants the residual."""
        before, update = zip(*self._cache.streams[layer_idx])
        return torch.cat(before, 1), torch.cat(update, 1)

    @property
    def num_layers(self) -> int:
        return len(self._cache.layers)

    @property
    def softmax_scale(self) -> float:
        return self._cache.scales[0]

    def compress(self, method: Method | None, *, reserve: int = 0, fresh: bool = False) -> CompressedCache:
        """A new cache of the prompt, cut by `method`; None keeps every entry. The reading itself stays whole.

        Scores are computed once for all budgets of a method; `fresh` computes them again, to be timed.
        """
        shared = None if method is None else _SharedScores(method, {} if fresh else self._scores)
        cache = CompressedCache(self.model.config, shared, reserve=reserve)  # type: ignore[arg-type]
        cache.method = method
        for layer_idx in range(self.num_layers):
            queries, keys, values = self.layer(layer_idx)
            if queries.shape[2] == 0:
                queries = keys.new_empty((keys.shape[0], keys.shape[1], 0, keys.shape[3]))
            cache.update(keys, values, layer_idx)
            scale, attachment = self._cache.scales[layer_idx], self._cache.attachment
            cache.attend(layer_idx, queries, None, scale, attachment, attended=queries)
            if cache.wants_residual(layer_idx):
                cache.observe(layer_idx, *self.stream(layer_idx))
        if cache.lookahead is not None:
            self._draft(cache, {} if fresh else self._scores)
        cache.finish_prompt()
        return cache

    def _draft(self, cache: CompressedCache, held: dict[Any, Any]) -> None:
        """The draft of a method that looks ahead; budgets that draft alike share it."""
        key = cache.lookahead
        if key not in held:
            _look_ahead(self.model, cache, self._next)
            layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
            held[key] = [layer.lookahead for layer in layers]
        queries = {i: t for i, (t, _) in enumerate(held[key]) if t is not None}
        cache.take_lookahead(queries, held[key][0][1])


class _SharedScores:
    """A method whose scores are computed once a prompt, however many budgets ask for them."""

    def __init__(self, method: Method, held: dict[Any, Any]) -> None:
        self._method, self._held = method, held

    def stages(self) -> Stages:
        stages = self._method.stages()
        return replace(stages, score=_Shared(stages.score, stages.lookahead, self._held))

    def __str__(self) -> str:
        return str(self._method)


class _Shared:
    def __init__(self, score: Any, lookahead: Any, held: dict[Any, Any]) -> None:
        self._score, self._lookahead, self._held = score, lookahead, held

    def __getattr__(self, name: str) -> Any:
        return getattr(self._score, name)

    def __call__(self, layer: LayerState) -> Tensor:
        key = (self._score, self._lookahead, layer.index)
        if key not in self._held:
            self._held[key] = self._score(layer)
        return self._held[key]

    def __str__(self) -> str:
        return str(self._score)
