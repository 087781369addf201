"""Reading: prompts that the model reads once, to be compressed by any number of methods.

A prompt always attends in full, so what a method is given (K, V, queries, the residual stream) does not depend on the
method. A `Reading` keeps it and hands it to a new `CompressedCache` for every method and budget, through the same two
calls that the model makes; only the attention itself is not computed again. Several prompts are the rows of one batch,
padded on the left.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import get_layer_types_and_kwargs

from kvcompress.layer import ALL_QUERIES, LayerState
from kvcompress.methods import Method
from kvcompress.models import Attachment, CompressedCache, cache_argument
from kvcompress.models.layer import CompressedLayer
from kvcompress.models.lookahead import look_ahead
from kvcompress.models.rows import Rows, last_columns
from kvcompress.pipeline import Pipeline, Stages

__all__ = ["Prompts", "Reading", "compress_directly", "feed", "read", "replayable"]


class Prompts(Protocol):
    """What questions are asked on: prompts, ready to be compressed by any method."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        ...

    def extended(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> Prompts:
        """New prompts: that of row ``rows[i]`` and ``ids[i]`` behind it. The old ones stay."""
        ...

    def compress(self, method: Method | None, *, reserve: int = 0, fresh: bool = False) -> CompressedCache:
        """A new cache of the prompts with room for `reserve` tokens, cut by `method`; None keeps every entry."""
        ...


def read(model: Any, prompts: Sequence[Sequence[int]], methods: Sequence[Method]) -> Prompts:
    """Prompts of an attached model, read once for all methods where that is possible; otherwise there may be only one."""
    if replayable(model.config):
        return Reading(model, prompts, methods)
    [prompt] = prompts
    return _Single(model, prompt)


def replayable(config: Any) -> bool:
    """Whether all layers attend in full: then a method needs nothing but what a `Reading` keeps."""
    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return set(kinds) == {"full_attention"}


def feed(
    model: Any, cache: CompressedCache, rows: Sequence[Sequence[int]], seen: Sequence[int], keep: int = 1
) -> Tensor:
    """One forward of new tokens, differently many a row, behind those that each row of the cache has seen.

    Returns:
        Logits of the last `keep` columns, ``[batch, keep, vocabulary]``; a row's last token is in the last one.
    """
    device, longest, columns = model.device, max(map(len, rows)), cache.get_seq_length()
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    past = torch.tensor([list(seen)], device=device).T
    order = torch.arange(longest, device=device) - torch.tensor([[longest - len(row)] for row in rows], device=device)
    options: dict[str, Any] = {"position_ids": past + order.clamp(min=0)}
    if min(map(len, rows)) < longest or min(seen) < columns:
        before = torch.arange(columns, device=device) >= columns - past
        options["attention_mask"] = torch.cat([before, order >= 0], 1).long()
    options[cache_argument(model)] = cache
    return model(ids, use_cache=True, logits_to_keep=keep, **options).logits


def compress_directly(model: Any, ids: Sequence[int], method: Method | None, *, reserve: int = 0) -> CompressedCache:
    """The cache of a prompt, by the model itself: what a user's own loop does."""
    cache = CompressedCache(model.config, method, reserve=reserve)
    logits = feed(model, cache, [ids], [0])
    if cache.lookahead is not None:
        _look_ahead(model, cache, logits[:, -1:].argmax(-1), [len(ids)])
    cache.finish_prompt()
    return cache


def _look_ahead(model: Any, cache: CompressedCache, token: Tensor, lengths: Sequence[int]) -> None:
    """The draft of a method that looks ahead, as greedy decoding from the prompts' own logits would begin it."""
    seen = torch.tensor([list(lengths)], device=token.device).T
    name = cache_argument(model)
    inputs = {"input_ids": token, "position_ids": seen, name: cache, "use_cache": True}
    columns = cache.get_seq_length()
    if min(lengths) < columns:
        inputs["attention_mask"] = (torch.arange(columns + 1, device=token.device) >= columns - seen).long()
    look_ahead(model, cache, inputs, name)


class _Single:
    """A prompt of a model that has other layers as well: every method reads it anew."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.model, self.ids = model, list(ids)

    @property
    def lengths(self) -> list[int]:
        return [len(self.ids)]

    def extended(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> _Single:
        [new], _ = ids, rows
        return _Single(self.model, [*self.ids, *new])

    def compress(self, method: Method | None, *, reserve: int = 0, fresh: bool = False) -> CompressedCache:
        return compress_directly(self.model, self.ids, method, reserve=reserve)


class _Recorder(CompressedCache):
    """A full cache that remembers the last queries and the residual stream of all layers, each row's real ones last."""

    def __init__(self, config: Any, queries: int, residual: bool) -> None:
        super().__init__(config)
        self.limit, self.residual = queries, residual
        self.queries: dict[int, Tensor] = {}
        self.streams: dict[int, tuple[Tensor, Tensor]] = {}
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
        if self.residual and attachment is not None:
            attachment.require_residual(layer_idx)
        real = None if rows is None else rows.new
        self.queries[layer_idx] = last_columns(self.queries.get(layer_idx), query, real, self.limit)
        return super().attend(layer_idx, query, rows, scale, attachment, attended)

    def wants_residual(self, layer_idx: int) -> bool:
        return self.residual and isinstance(self.layers[layer_idx], CompressedLayer)

    def observe(self, layer_idx: int, before: Tensor, update: Tensor) -> None:
        held = self.streams.get(layer_idx, (None, None))
        real = self._layer(layer_idx).new_real
        pairs = ((None if old is None else old[:, None], new[:, None]) for old, new in zip(held, (before, update)))
        both = [last_columns(old, new, real, ALL_QUERIES)[:, 0] for old, new in pairs]
        self.streams[layer_idx] = (both[0], both[1])


class Reading:
    """A model's whole cache of some prompts, and what methods look at besides; the model must be attached.

    Layers that do not attend in full keep their own caches, which are handed on as they are.

    Args:
        model: an attached causal LM.
        ids: the prompt, or several prompts where all layers attend in full.
        methods: which methods will compress it; says how many queries are kept, and whether the residual stream is.
        queries: at least so many queries are kept.
    """

    def __init__(
        self, model: Any, ids: Sequence[int] | Sequence[Sequence[int]], methods: Sequence[Method], *, queries: int = 0
    ) -> None:
        self.model = model
        if len(_rows(ids)) > 1 and not replayable(model.config):
            raise ValueError(
                f"Reading: ids must be one prompt where layers do not attend in full, got {len(_rows(ids))}"
            )
        pipelines = [Pipeline(method.stages(), 1) for method in methods]
        wanted = min(ALL_QUERIES, max([queries, *(pipeline.queries for pipeline in pipelines)]))
        self._wants = wanted, any(pipeline.wants_residual for pipeline in pipelines)
        self._begin([len(row) for row in _rows(ids)], torch.zeros(0, 0))
        self._next = self._read(_rows(ids)).argmax(-1)

    def _begin(self, lengths: list[int], following: Tensor) -> None:
        self._cache = _Recorder(self.model.config, *self._wants)
        self._layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._scores: dict[Any, Any] = {}  # what is computed once for all budgets
        self.lengths, self._next = lengths, following

    def _read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The prompts, or how they go on. Returns the logits ``[batch, 1, vocabulary]`` of each row's last token."""
        seen = [n - len(row) for n, row in zip(self.lengths, rows)]
        return feed(self.model, self._cache, rows, seen)

    def extended(self, ids: Sequence[int] | Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> Reading:
        """A new reading: of the prompt of row ``rows[i]`` (None: of each row) and ``ids[i]`` behind it. This one stays."""
        more = _rows(ids)
        picked = list(range(len(self.lengths))) if rows is None else list(rows)
        other = copy.copy(self)
        place = torch.tensor(picked, device=self._next.device)
        other._begin([self.lengths[i] + len(new) for i, new in zip(picked, more)], self._next[place])
        self._hand_over(other._cache, picked)
        if any(more):
            logits = other._read(more).argmax(-1)
            goes_on = torch.tensor([[bool(new)] for new in more], device=logits.device)
            other._next = torch.where(goes_on, logits, other._next)
        return other

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last queries ``[batch, num_q_heads, n, head_dim]``, all keys and all values of a layer, padded on the left."""
        if layer_idx not in self._layers:
            layer = self._cache.layers[layer_idx]
            assert isinstance(layer, CompressedLayer), "layer_idx is one of layers"
            assert layer.store is not None
            keys, values = layer.store.prompt()
            queries = self._cache.queries[layer_idx]
            self._layers[layer_idx] = queries[:, :, max(0, queries.shape[2] - keys.shape[2]) :], keys, values
        return self._layers[layer_idx]

    def stream(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """What entered a layer and what its attention added, ``[batch, tokens, hidden]``; kept if a method wants the residual."""
        longest = max(self.lengths)
        before, update = (t[:, t.shape[1] - longest :] for t in self._cache.streams[layer_idx])
        return before, update

    @property
    def layers(self) -> list[int]:
        """The layers that attend in full, which methods compress."""
        return [i for i, layer in enumerate(self._cache.layers) if isinstance(layer, CompressedLayer)]

    def softmax_scale(self, layer_idx: int) -> float:
        return self._cache.scales[layer_idx]

    def compress(self, method: Method | None, *, reserve: int = 0, fresh: bool = False) -> CompressedCache:
        """A new cache of the prompts, cut by `method`; None keeps every entry. The reading itself stays whole.

        Scores are computed once for all budgets of a method; `fresh` computes them again, to be timed.
        """
        shared = None if method is None else _SharedScores(method, {} if fresh else self._scores)
        cache = CompressedCache(self.model.config, shared, reserve=reserve)  # type: ignore[arg-type]
        cache.method = method
        self._hand_over(cache, list(range(len(self.lengths))))
        if cache.lookahead is not None:
            self._draft(cache, {} if fresh else self._scores)
        cache.finish_prompt()
        return cache

    def _hand_over(self, cache: CompressedCache, picked: list[int]) -> None:
        """The prompts of these rows as the first forward of an empty cache."""
        lengths = [self.lengths[i] for i in picked]
        longest, all_rows = max(lengths), picked == list(range(len(self.lengths)))
        rows = None if min(lengths) == longest else Rows(lengths, lengths, longest, True)

        def mine(t: Tensor, dim: int) -> Tensor:
            t = t if all_rows else t.index_select(0, torch.tensor(picked, device=t.device))
            return t.narrow(dim, max(0, t.shape[dim] - longest), min(longest, t.shape[dim]))

        for layer_idx, layer in enumerate(self._cache.layers):
            if not isinstance(layer, CompressedLayer):
                cache.layers[layer_idx] = copy.deepcopy(layer)
                continue
            queries, keys, values = (mine(t, 2) for t in self.layer(layer_idx))
            cache.update(keys, values, layer_idx)
            scale, attachment = self._cache.scales[layer_idx], self._cache.attachment
            cache.attend(layer_idx, queries, rows, scale, attachment, attended=queries)
            if cache.wants_residual(layer_idx):
                before, update = (mine(t, 1) for t in self.stream(layer_idx))
                cache.observe(layer_idx, before, update)

    def _draft(self, cache: CompressedCache, held: dict[Any, Any]) -> None:
        """The draft of a method that looks ahead; budgets that draft alike share it."""
        key = cache.lookahead
        if key not in held:
            _look_ahead(self.model, cache, self._next, self.lengths)
            layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
            held[key] = {layer.layer_idx: layer.lookahead for layer in layers}
        queries = {i: t for i, (t, _) in held[key].items() if t is not None}
        cache.take_lookahead(queries, held[key][self.layers[0]][1])


def _rows(ids: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """One prompt or several, as several."""
    rows: list[Any] = list(ids)
    return [list(row) for row in rows] if rows and not isinstance(rows[0], int) else [rows]


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
