"""CompressedCache: what generate() takes as past_key_values."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from kvcompress.lookahead import Lookahead
from kvcompress.models.attention import expect
from kvcompress.models.layer import CompressedLayer
from kvcompress.models.rows import Rows
from kvcompress.models.stats import CacheStats, LayerStats
from kvcompress.pipeline import Pipeline, Stages
from kvcompress.when import EveryStep

if TYPE_CHECKING:
    from kvcompress.methods import Method
    from kvcompress.models.attach import Attachment

__all__ = ["CompressedCache", "cache_argument"]

_FORMAT = "kvcompress cache 1"


def cache_argument(model: Any) -> str:
    """What the forward of `model` calls its cache: ``past_key_values``; ``cache`` from transformers 5.24 on, which means to drop
    the older name in 5.40.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class CompressedCache(Cache):
    """A KV cache that keeps what a method selects, for any causal LM of transformers that is attached.

    The prompt attends in full; each layer is cut right after its own attention, so the peak is one layer's whole K and V beside
    the compressed rest. Decoding appends in place. Sliding-window and linear layers of hybrid models keep the layers of
    transformers. A forward is part of the prompt until one ends beyond the budget or a single token is decoded; what comes
    later (a question, a turn, drafts) is kept whole.

    Args:
        config: the model's configuration.
        method: from `kvcompress.methods.create`; None keeps every entry, with the same store and attention.
        chunked_prefill: the prompt comes in several forwards; nothing is cut before the first single token.
        reserve: free slots behind the kept entries, and the least growth later.

    Example:
        >>> cache = CompressedCache(model.config, methods.create("snapkv", budget=0.1))
        >>> with attach(model):
        ...     model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        method: Method | None = None,
        *,
        chunked_prefill: bool = False,
        reserve: int = 128,
    ) -> None:
        config = config.get_text_config(decoder=True)
        _refuse_shared_layers(config)
        kinds, kwargs = get_layer_types_and_kwargs(config)
        each = kwargs if isinstance(kwargs, list) else [kwargs] * len(kinds)  # one dict for all up to 5.17
        count = kinds.count("full_attention")
        if count == 0:
            raise ValueError(
                f"CompressedCache: config must have a full_attention layer to compress, got {', '.join(sorted(set(kinds)))}"
            )
        self.method = method
        self.chunked_prefill = chunked_prefill
        self._pipeline = None if method is None else Pipeline(self._stages(method), count, reserve=reserve)
        self._compressed: list[CompressedLayer] = []
        self._others: dict[int, Callable[[], Any]] = {}  # how to make the layers that are not compressed
        layers: list[Any] = []
        for layer_idx, (kind, options) in enumerate(zip(kinds, each)):
            if kind == "full_attention":
                layer = CompressedLayer(len(self._compressed), layer_idx, count, self._pipeline, reserve)
                self._compressed.append(layer)
                layers.append(layer)
            else:
                self._others[layer_idx] = partial(DYNAMIC_LAYER_TYPE_MAPPING[kind], **options)
                layers.append(self._others[layer_idx]())
        super().__init__(layers=layers)
        self._forget()

    def _stages(self, method: Method) -> Stages:
        """What the method is made of, if this cache can do it."""
        stages = method.stages()
        if stages.is_ragged and isinstance(stages.when, EveryStep):
            raise ValueError(
                f"CompressedCache: heads of different counts evict while decoding in a FixedCache only, got {method}"
            )
        return stages

    def _forget(self) -> None:
        self._waiting: int | None = None  # the layer whose attention has not run yet
        self._decoding = False  # of this forward
        self._cut = False  # whether it ends the prompt
        if self._pipeline is not None:
            self._pipeline.reset()

    def reset(self) -> None:
        """Forgets everything: the next forward is a new prompt."""
        for layer in self._compressed:
            layer.reset()
        for layer_idx, make in self._others.items():  # their own reset leaves zeroed entries behind in some releases
            self.layers[layer_idx] = make()
        self._forget()

    # --- a forward, layer by layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a layer's new tokens; on compressed layers its attention, which must come next, stores them."""
        if self._waiting is not None:
            raise RuntimeError(
                f"CompressedCache: the attention of layer {self._waiting} did not run through kvcompress, so nothing was stored; "
                "run the model inside `with kvcompress.models.attach(model):`, and call cache.reset() first"
            )
        if torch.compiler.is_compiling():
            raise NotImplementedError("CompressedCache: torch.compile of the model is not supported; run it eagerly")
        if isinstance(self.layers[layer_idx], CompressedLayer):
            self._waiting = layer_idx
            expect(self, layer_idx, key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        rows: Rows | None,
        scale: float,
        attachment: Attachment | None,
        attended: Tensor | None = None,
    ) -> Tensor:
        """The attention of a compressed layer, right after its `update`: ``[batch, num_q_heads, n, head_dim]``.

        `attended` is that output for a whole prompt that was read before (see `CompressedLayer.prompt`).
        """
        layer = self._layer(layer_idx)
        inv_freq = self._needs(layer, attachment)
        self._waiting = None
        if layer.index == 0:
            self._begin(query.shape[2])
        if self._decoding:
            return layer.decode(query, rows, scale, inv_freq)
        return layer.prompt(query, rows, scale, inv_freq, cut=self._cut, attended=attended)

    def _layer(self, layer_idx: int) -> CompressedLayer:
        layer = self.layers[layer_idx]
        assert isinstance(layer, CompressedLayer), "only compressed layers announce their attention"
        return layer

    def check(self, attachment: Attachment) -> None:
        """Asks an attached model for all that the method will want of it, before anything runs.

        Raises:
            NotImplementedError: what it cannot give.
        """
        for layer in self._compressed:
            self._needs(layer, attachment)

    def waits_for(self, layer_idx: int) -> bool:
        """Whether the attention of this layer is the next that must come."""
        return self._waiting == layer_idx

    def _needs(self, layer: CompressedLayer, attachment: Attachment | None) -> Tensor | None:
        """What only an attached model can give."""
        rotates = self._pipeline is not None and self._pipeline.stages.attend is not None
        if attachment is None and (rotates or layer.wants_residual):
            raise RuntimeError(
                f"CompressedCache: {self.method} looks into the model; run it inside `with kvcompress.models.attach(model):`"
            )
        if attachment is None:
            return None
        if layer.wants_residual:
            attachment.require_residual(layer.layer_idx)
        if rotates:
            attachment.require_fixed_rotation()
        return attachment.inv_freq

    def _begin(self, new: int) -> None:
        """What kind of forward this is: the same for all layers."""
        first = self._compressed[0]
        if first.store is not None and not first.prompt_over:
            dropped = any(not layer.is_complete for layer in self._compressed)
            if new == 1 or dropped:
                self.finish_prompt()
        self._decoding = first.prompt_over
        waits = self.chunked_prefill or first.record_past or self.lookahead is not None
        self._cut = self._pipeline is not None and not waits

    @property
    def lookahead(self) -> Lookahead | None:
        """The draft that the method makes before it cuts."""
        return None if self._pipeline is None else self._pipeline.stages.lookahead

    def wants_draft(self, new: int) -> bool:
        """Whether a forward of `new` tokens must wait for the draft."""
        first = self._compressed[0]
        held = first.store is not None and not first.prompt_over and first.lookahead[0] is None
        return held and new == 1 and self.lookahead is not None

    def take_lookahead(self, queries: dict[int, Tensor], lengths: list[int]) -> None:
        """The queries ``[batch, num_q_heads, n, head_dim]`` of a draft, layer by layer; row b's are the first ``lengths[b]``."""
        for layer in self._compressed:
            layer.lookahead = (queries[layer.layer_idx], lengths)

    def activate_past_recording(self) -> None:
        """Drafts of an assistant may follow."""
        if self.lookahead is not None:
            raise NotImplementedError(
                f"CompressedCache: {self.method} cuts when the first token is decoded, by a draft of its own, so an assistant's "
                "drafts cannot come before; generate without an assistant"
            )
        super().activate_past_recording()

    def finish_prompt(self) -> None:
        """Ends the prompt: cuts what chunked prefill holds, as the first decoded token would.

        Raises:
            RuntimeError: a layer still holds more than its budget; nothing is kept uncut silently.
        """
        for layer in self._compressed:
            layer.finish_prompt()
        if self._pipeline is None:
            return
        if self._pipeline.is_waiting:
            raise RuntimeError(f"CompressedCache: {self.method} is still waiting for measurements of some layers")
        for layer in self._compressed:
            store = layer.store
            if store is None:
                continue
            if not self._pipeline.is_within(store):
                raise RuntimeError(
                    f"CompressedCache: {self.method} must leave at most {store.targets} entries in layer {layer.layer_idx}, "
                    f"got {store.lengths}"
                )

    def wants_residual(self, layer_idx: int) -> bool:
        """Whether `observe` waits for the residual stream around this layer's attention."""
        layer = self.layers[layer_idx]
        return isinstance(layer, CompressedLayer) and layer.wants_residual

    def observe(self, layer_idx: int, before: Tensor, update: Tensor) -> None:
        """Takes the stream that enters a decoder layer and what its attention adds, ``[batch, n, hidden]`` each."""
        self._layer(layer_idx).observe(before, update)

    # --- drafts and the batch

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens; in assisted decoding, the first time also ends the prompt."""
        tokens_to_remove = int(tokens_to_remove)
        recorded = any(layer.record_past for layer in self._compressed)
        super().crop(tokens_to_remove)
        if recorded:
            self.finish_prompt()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows that beam search goes on with."""
        picked = beam_idx.tolist()  # one device read for all layers
        layer: Any
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.select_rows(beam_idx, picked)
            else:
                layer.reorder_cache(beam_idx)

    # --- what it holds

    def stats(self) -> CacheStats:
        """Logical and stored entries and bytes, layer by layer, and what each layer's scorer saw."""
        layers = []
        for layer in self._compressed:
            seen = [] if layer.store is None else list(layer.store.seen)
            entries = [] if layer.store is None else list(layer.store.lengths)
            heads = [] if layer.store is None else layer.store.head_lengths
            layers.append(LayerStats(layer.layer_idx, seen, entries, heads, layer.nbytes, self._scorer(layer)))
        others = (layer for layer in self.layers if not isinstance(layer, CompressedLayer))
        nbytes = sum(layer.nbytes for layer in layers) + sum(_held_bytes(layer) for layer in others)
        name = "full cache" if self.method is None else str(self.method)
        return CacheStats(name, self._compressed[0].columns, nbytes, layers)

    def scorer(self, row: int) -> str:
        """What the choice of one row's entries was based on, in the first compressed layer."""
        return self._scorer(self._compressed[0], row)

    def _scorer(self, layer: CompressedLayer, row: int | None = None) -> str:
        """The same of a layer; None: of all rows."""
        if self._pipeline is None:
            return "every entry is kept"
        if layer.cut_from is None:
            return "nothing yet: the prompt is not over"
        rows = slice(None) if row is None else slice(row, row + 1)
        targets = [] if layer.store is None or layer.store.targets is None else layer.store.targets[rows]
        prompts = layer.cut_from[rows]
        if all(most >= length for most, length in zip(targets, prompts)):
            return "nothing: the prompt fits into the budget"
        if self._pipeline.queries == 0:
            return str(self._pipeline.stages.score)
        shortest, longest = min(prompts), max(prompts)
        tokens = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
        return f"last {min(self._pipeline.queries, longest)} of {tokens} prompt tokens"

    def positions(self, layer: int) -> Tensor:
        """Original positions of a layer's entries, ``[batch, heads, max_entries]`` int32, -1 behind a row's last one."""
        store = getattr(self.layers[layer], "store", None)
        if store is None:
            raise ValueError(
                f"CompressedCache.positions: layer must be a compressed layer that holds entries, got {layer}"
            )
        return store.padded_positions()

    # --- saving

    def save(self, path: str | PathLike[str]) -> None:
        """Writes entries, positions and counters as safetensors; room for new tokens is not written."""
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {"method": None if self.method is None else str(self.method), "layers": []}
        for layer_idx, layer in enumerate(self.layers):
            state, numbers = _save_layer(layer)
            tensors.update({f"{layer_idx}.{name}": t.cpu().contiguous() for name, t in state.items()})
            meta["layers"].append(numbers)
        save_file(tensors, str(path), metadata={"format": _FORMAT, "cache": json.dumps(meta)})

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        config: PreTrainedConfig,
        method: Method | None = None,
        *,
        device: torch.device | str = "cpu",
        chunked_prefill: bool = False,
        reserve: int = 128,
    ) -> CompressedCache:
        """Reads what `save` wrote; generation goes on as if the cache had stayed in memory.

        `method` may be left out if its work is done (it cut once, and the prompt is over); what it kept is all that counts.

        Raises:
            ValueError: another file, another model, another method, or none where it is still needed.
        """
        with safe_open(str(path), "pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"CompressedCache.load: path must be a file of CompressedCache.save, got {path}")
            meta = json.loads(header["cache"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        cache = cls(config, method, chunked_prefill=chunked_prefill, reserve=reserve)
        if len(meta["layers"]) != len(cache.layers):
            raise ValueError(
                f"CompressedCache.load: config must have {len(meta['layers'])} layers, as the file, got {len(cache.layers)}"
            )
        if method is not None and str(method) != meta["method"]:
            raise ValueError(f"CompressedCache.load: method must be {meta['method']}, as in the file, got {method}")
        if method is None and any(numbers.get("needs_method") for numbers in meta["layers"]):
            raise ValueError(f"CompressedCache.load: method must be {meta['method']}, which is still at work, got None")
        for layer_idx, (layer, numbers) in enumerate(zip(cache.layers, meta["layers"])):
            prefix = f"{layer_idx}."
            state = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
            _load_layer(layer, state, numbers)
        return cache


def _save_layer(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(layer, CompressedLayer):
        return layer.state_dict()
    if isinstance(layer, DynamicSlidingWindowLayer) and type(layer).__name__ == "DynamicSlidingWindowLayer":
        state: dict[str, Any] = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
        return state, {"kind": "sliding", "seen": layer.cumulative_length}
    raise NotImplementedError(f"CompressedCache.save: layers of type {type(layer).__name__} cannot be saved")


def _load_layer(layer: Any, state: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    kind = "compressed" if isinstance(layer, CompressedLayer) else "sliding"
    if numbers["kind"] != kind:
        raise ValueError(
            f"CompressedCache.load: config must have the kinds of layers of the file, got {kind} for {numbers['kind']}"
        )
    if isinstance(layer, CompressedLayer):
        layer.load_state_dict(state, numbers)
    elif state:
        layer.lazy_initialization(state["keys"], state["values"])
        layer.keys, layer.values, layer.cumulative_length = state["keys"], state["values"], numbers["seen"]


def _held_bytes(layer: Any) -> int:
    """Bytes of a layer that transformers manages."""
    held = [getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states")]
    tensors = [t for one in held for t in (one if isinstance(one, list) else [one])]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _refuse_shared_layers(config: PreTrainedConfig) -> None:
    modes = getattr(config, "kv_sharing_modes", None) or []
    if getattr(config, "num_kv_shared_layers", None) or "reuse" in modes:
        raise NotImplementedError(
            f"CompressedCache: layers that read the keys and values of other layers ({config.model_type}) are not supported"
        )
