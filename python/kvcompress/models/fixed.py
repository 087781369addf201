"""FixedCache: a compressed cache whose decode steps can be compiled, or captured in a CUDA graph."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from kvcompress.cache import DenseStore
from kvcompress.fixed import FixedStore, Turnover
from kvcompress.fixed_ragged import RaggedFixedStore
from kvcompress.models.cache import CompressedCache
from kvcompress.models.rows import Rows
from kvcompress.models.stats import CacheStats, LayerStats
from kvcompress.pipeline import Stages
from kvcompress.ragged import RaggedStore

if TYPE_CHECKING:
    from kvcompress.methods import Method
    from kvcompress.models.attach import Attachment

__all__ = ["FixedCache", "FixedLayer"]


def same_address(held: Tensor | None, new: Tensor) -> Tensor:
    """The values of `new` where compiled and captured steps look for them: in `held`, if that is such a tensor."""
    if held is None or (held.shape, held.dtype, held.device) != (new.shape, new.dtype, new.device):
        held = torch.empty_like(new)
        torch._dynamo.mark_static_address(held)
    return held.copy_(new)


def _ring(layer: DynamicSlidingWindowLayer, seen: list[int]) -> DenseStore:
    """What a sliding-window layer holds of a left-padded prompt of `seen` tokens a row, with a budget of its window."""
    keys, values = layer.keys, layer.values
    assert keys is not None
    assert values is not None
    held = [min(n, keys.shape[2]) for n in seen]
    store = DenseStore.from_prefill(keys, values, held, reserve=0)
    store.positions += torch.tensor([n - k for n, k in zip(seen, held)], device=keys.device)[:, None, None]
    store.seen, store.targets = list(seen), [layer.sliding_window] * len(seen)
    return store


class FixedLayer(CacheLayerMixin):
    """One layer while decoding: the store, and the tokens that wait for their attention.

    Attributes:
        store: the entries.
        pending: keys and values of the forward whose attention comes next.
        cumulative_length: tokens seen, padding included, a 0-dim int64 tensor on the device, the same for all layers.
        is_last: of the model's layers, the one that counts a forward's tokens.
        is_sliding: a sliding-window layer of the model, whose store is a ring as long as the window.
    """

    is_compileable = True
    supports_early_init = False

    def __init__(self, turnover: Turnover, *, is_last: bool, is_sliding: bool = False) -> None:
        super().__init__()
        self.is_last, self.is_sliding = is_last, is_sliding
        self.store = (RaggedFixedStore if turnover.is_ragged else FixedStore)(turnover)
        self.pending: tuple[Tensor, Tensor] | None = None
        self.cumulative_length: Tensor | None = None  # type: ignore[assignment]  # the base class types it as an int
        self.inv_freq: Tensor | None = None

    def load(
        self,
        store: DenseStore | RaggedStore,
        cumulative_length: Tensor,
        inv_freq: Tensor | None,
        *,
        room: int,
        capacity: int | None,
    ) -> None:
        """Takes over a compressed prompt, see `FixedStore.load`."""
        self.store.load(store, room=room, capacity=capacity)
        self.cumulative_length = cumulative_length
        self.inv_freq = (
            None if inv_freq is None else same_address(self.inv_freq, inv_freq.to(store.keys.device).float())
        )
        self.pending = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the prompt says what there is to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Holds the new tokens until their attention."""
        self.pending = (key_states, value_states)
        return key_states, value_states

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Stores the tokens that wait, evicts for them, and attends: ``[batch, num_q_heads, n, head_dim]``."""
        assert self.pending is not None
        assert self.cumulative_length is not None
        (keys, values), self.pending = self.pending, None
        out = self.store.step(query, keys, values, softmax_scale=scale, inv_freq=self.inv_freq)
        if self.is_last:
            self.cumulative_length.add_(query.shape[2])
        return out

    def get_seq_length(self) -> Tensor:  # type: ignore[override]
        """Tokens seen, padding included, on the device: a compiled step must not know the number."""
        assert self.cumulative_length is not None
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the new tokens: what is stored is bounded by the store's own lengths, not by a mask."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Nothing: `FixedCache.reset` goes back to a new prompt; the buffers stay."""


class FixedCache(CompressedCache):
    """A `CompressedCache` that decodes over buffers of fixed room.

    The prompt is read and cut as there. Then every layer moves into a `FixedStore`: a token takes a free slot, or, where the
    method evicts while decoding, that of the entry that matters least; counters live on the device, and each step is the
    same launches of the same shapes, three a layer (OBCache: four; see `FixedStore`) and one a step. So the decode step of an unmodified model compiles with ``fullgraph=True`` and can be
    captured in a CUDA graph, once for all prompts: the buffers keep their addresses over `reset()`, as long as batch and
    capacity stay the same.

    Heads of different counts (AdaKV, LAVa) have stretches of their own there; where the method goes on evicting, each stays at the
    number of entries that the prompt's cut gave it. Beams are refused for them.

    Sliding-window layers of a hybrid model decode over rings as long as their windows, likewise of fixed room; their attention needs
    no mask then.

    Tokens behind the prompt must all be real (no padding), and are taken 8 at a time; where entries are overwritten, a
    token of a forward of several already displaces older ones before the next eight attend.

    Args:
        config: the model's configuration; its layers attend in full or over a sliding window.
        method: cuts once, or evicts one entry a token (`morphkv`; `h2o`, `tova`, `obcache` with ``decode=True``; `streaming_llm`,
            `sliding_window`). None keeps every entry.
        room: tokens that may come behind the prompt where nothing is evicted; one more raises (in compiled and captured steps
            only `check_room` can tell).
        capacity: slots of a layer, the same for every prompt (on the mean of its heads, where they differ); None: as many as the
            prompt at hand needs. With a budget in entries that is the same for all.
        chunked_prefill: the prompt comes in several forwards and ends with `finish_prompt()`.
        compiles: `generate()` compiles the decode steps by itself on CUDA, as it does for every cache that says so.

    Raises:
        ValueError: a method whose evictions are no single overwritten slots (see `kvcompress.fixed.Turnover`).
        NotImplementedError: a model with other layers, or a method that drafts before it cuts.

    Example:
        >>> cache = FixedCache(model.config, methods.create("morphkv", budget=1024))
        >>> with attach(model):
        ...     logits = model(prompt, past_key_values=cache).logits
        ...     step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
        ...     step(token, position_ids=position, past_key_values=cache)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        method: Method | None = None,
        *,
        room: int = 256,
        capacity: int | None = None,
        chunked_prefill: bool = False,
        compiles: bool = False,
    ) -> None:
        turnover = Turnover() if method is None else Turnover.of(method.stages())
        self.room, self.capacity, self.compiles = room, capacity, compiles
        self._fixed: list[FixedLayer] | None = None  # while decoding
        self._behind = 0  # tokens behind the prompt, as far as the host sees them
        self._fits = room  # how many fit: with more slots than the prompt needs, more than `room`
        self._turnover = turnover
        super().__init__(config, method, chunked_prefill=chunked_prefill, reserve=8)
        kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        others = sorted({*kinds} - {"full_attention", "sliding_attention"})
        if others:
            raise NotImplementedError(
                f"FixedCache: layers must attend in full or over a sliding window, got {', '.join(others)}; use CompressedCache"
            )
        if self.lookahead is not None:
            raise NotImplementedError(f"FixedCache: {method} drafts before it cuts, which needs CompressedCache")
        self._prompt_layers = list(self._compressed)
        ring = Turnover(evicts=True)
        last = len(kinds) - 1
        self._decode_layers = [
            FixedLayer(turnover, is_last=i == last)
            if kind == "full_attention"
            else FixedLayer(ring, is_last=i == last, is_sliding=True)
            for i, kind in enumerate(kinds)
        ]
        self._columns: Tensor | None = None
        self._attachment: weakref.ref[Attachment] | None = None

    @property
    def is_compileable(self) -> bool:
        """Whether `generate()` is to compile the decode steps."""
        return self.compiles and not any(layer.record_past for layer in self._compressed)

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt is over and lies in the fixed buffers."""
        return self._fixed is not None

    def reset(self) -> None:
        """The next forward is a new prompt. Buffers and their addresses stay."""
        self._fixed = None
        for prompt in self._prompt_layers:
            self.layers[prompt.layer_idx] = prompt
        super().reset()  # which makes the others anew

    # --- the prompt

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._fixed is not None:
            if layer_idx == 0:
                self._take_room(key_states)
            return self._fixed[layer_idx].update(key_states, value_states)
        held = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self._others and layer_idx == len(self.layers) - 1:
            self._fix()  # this layer still attends over what it has been given here
        return held

    def _stages(self, method: Method) -> Stages:
        return method.stages()  # `Turnover` has said what cannot be done

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        rows: Rows | None,
        scale: float,
        attachment: Attachment | None,
        attended: Tensor | None = None,
    ) -> Tensor:
        if attachment is None:
            raise RuntimeError("FixedCache: run the model inside `with kvcompress.models.attach(model):`")
        self._attachment = weakref.ref(attachment)
        out = super().attend(layer_idx, query, rows, scale, attachment, attended)
        if layer_idx == self._prompt_layers[-1].layer_idx:
            self._fix()
        return out

    def observe(self, layer_idx: int, before: Tensor, update: Tensor) -> None:
        super().observe(layer_idx, before, update)
        if layer_idx == self._prompt_layers[-1].layer_idx:
            self._fix()

    def finish_prompt(self) -> None:
        super().finish_prompt()
        self._fix()

    def _fix(self) -> None:
        """Moves the cut prompt into the fixed buffers, once all layers are cut for good."""
        waits = self._pipeline is not None and self._pipeline.is_waiting
        keeps_all = self._pipeline is None and not self.chunked_prefill and not self._compressed[0].record_past
        cut = keeps_all or all(layer.is_cut for layer in self._compressed)
        attachment = None if self._attachment is None else self._attachment()
        first = self._prompt_layers[0]
        others: dict[int, Any] = {i: self.layers[i] for i in self._others}
        behind = any(layer.get_seq_length() != first.columns for layer in others.values())
        if self._fixed is not None or waits or not cut or behind or attachment is None:
            return
        assert first.store is not None
        seen = list(first.store.seen)
        self._columns = same_address(self._columns, torch.tensor(first.columns, device=first.store.keys.device))
        fits = []
        for prompt in self._prompt_layers:
            assert isinstance(prompt.store, (DenseStore, RaggedStore))
            fits.append(self._room_of(prompt.store))
            layer = self._decode_layers[prompt.layer_idx]
            layer.load(prompt.store, self._columns, prompt._inv_freq, room=self.room, capacity=self.capacity)
            prompt.prompt_over = True
            prompt.store = None  # its buffers are free from here on
        for layer_idx, other in others.items():
            ring = _ring(other, seen)
            self._decode_layers[layer_idx].load(ring, self._columns, None, room=0, capacity=None)
        for layer_idx, layer in enumerate(self._decode_layers):
            attachment.bind(layer_idx, layer)
        self._fixed, self._behind, self._fits = self._decode_layers, 0, min(fits)
        self.layers = list(self._decode_layers)

    def _room_of(self, store: DenseStore | RaggedStore) -> int:
        """Tokens that fit behind a prompt where nothing is evicted: with more slots than it needs, more than `room`."""
        if self.capacity is None or isinstance(store, RaggedStore) or self._turnover.is_ragged:
            return self.room
        return max(self.room, self.capacity - store.max_length)

    def _take_room(self, keys: Tensor) -> None:
        """Refuses tokens that do not fit any more, before anything is written. A compiled or captured step is run without
        the host: `check_room` finds out there.
        """
        if self._turnover.evicts or torch.compiler.is_compiling():
            return
        if keys.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        new = keys.shape[2]
        if self._behind + new > self._fits:
            raise RuntimeError(
                f"FixedCache: room must be at least the tokens behind the prompt ({self._behind + new}), got {self._fits}; make the "
                "cache with more room, or with a method that evicts while decoding"
            )
        self._behind += new

    # --- drafts and the batch

    def activate_past_recording(self) -> None:
        """Drafts may follow: the cut waits for the first `crop`."""
        if self._others:
            raise NotImplementedError(
                "FixedCache: sliding-window layers overwrite their oldest entries, so rejected drafts cannot be taken back; generate "
                "without an assistant, or use CompressedCache"
            )
        if self._turnover.evicts:
            raise NotImplementedError(
                "FixedCache: this method evicts entries while decoding, so rejected drafts cannot be taken back; generate without "
                "an assistant, or use a method that cuts once"
            )
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens; in assisted decoding, the first time also ends the prompt."""
        if self._fixed is None:
            super().crop(tokens_to_remove)
            return
        for layer in self._fixed:
            layer.store.crop(-int(tokens_to_remove))
        assert self._columns is not None
        self._columns.add_(int(tokens_to_remove))
        self._behind += int(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows that beam search goes on with, in place."""
        if self._fixed is None:
            super().reorder_cache(beam_idx)
            return
        for layer in self._fixed:
            layer.store.select_rows(beam_idx)

    # --- what it holds

    def check_room(self) -> None:
        """Raises RuntimeError where more tokens came than a cache that evicts nothing has room for; waits for the device.

        For compiled and captured steps, whose tokens the host does not count: one launched by itself raises at once. `stats` and
        `positions` call it.
        """
        for layer in self._fixed or []:
            layer.store.check_room()

    def stats(self) -> CacheStats:
        """As `CompressedCache.stats`; while decoding it waits for the device."""
        if self._fixed is None:
            return super().stats()
        self.check_room()
        layers = []
        for prompt in self._prompt_layers:
            store = self._fixed[prompt.layer_idx].store
            heads = store.head_lengths
            entries = [-(-sum(row) // len(row)) for row in heads]
            scorer = self._scorer(prompt)
            layers.append(LayerStats(prompt.layer_idx, store.row_seen, entries, heads, store.nbytes, scorer))
        name = "full cache" if self.method is None else str(self.method)
        nbytes = sum(layer.store.nbytes for layer in self._fixed)
        return CacheStats(name, int(self._fixed[0].get_seq_length()), nbytes, layers)

    def positions(self, layer: int) -> Tensor:
        """Original positions of a layer's entries, ascending, ``[batch, heads, capacity]`` int32, -1 behind a row's last one."""
        if self._fixed is None:
            return super().positions(layer)
        self.check_room()
        return self._fixed[layer].store.ordered_positions()

    def save(self, path: Any) -> None:
        """Not while decoding."""
        if self._fixed is not None:
            raise NotImplementedError(
                "FixedCache.save: the prompt must not be over; use CompressedCache to save what was decoded"
            )
        super().save(path)
