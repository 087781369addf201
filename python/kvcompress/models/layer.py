"""One full-attention layer of a compressed cache: holds the prompt, cuts it once, appends behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcompress.attend import attend, attend_with_lse
from kvcompress.budget import cosine_importance
from kvcompress.cache import DenseStore, Store, load_store
from kvcompress.layer import LayerState
from kvcompress.models.rows import Rows, last_columns
from kvcompress.pipeline import Pipeline

__all__ = ["CompressedLayer"]

_MAX_DRAFTS = 256  # queries and cosines kept beyond the score's own until rejected drafts are known


class CompressedLayer(CacheLayerMixin):
    """The store of one layer and the state of its prompt.

    As long as the prompt may go on and nothing of it is dropped, what a later cut looks at is kept beside the store: the
    last queries, what attention gave them, and the residual cosines. `CompressedCache` says when the prompt is over.

    Attributes:
        index: which of the compressed layers, from 0.
        layer_idx: which layer of the model.
        store: the entries; None before the first forward.
        columns: tokens seen, padding included.
        is_cut: the store holds what the method keeps of the prompt so far.
        prompt_over: no later forward belongs to the prompt.
        cut_from: real prompt tokens of each row at the cut.
        new_real: real tokens of each row in the last forward.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, index: int, layer_idx: int, num_layers: int, pipeline: Pipeline | None, reserve: int) -> None:
        self.index, self.layer_idx, self.num_layers = index, layer_idx, num_layers
        self.pipeline, self.reserve = pipeline, reserve
        self.reset()

    def __repr__(self) -> str:
        entries = "empty" if self.store is None else f"{self.store.max_length} of {self.columns}"
        return f"CompressedLayer({self.layer_idx}: {entries})"

    def reset(self) -> None:
        """Forgets everything: the next forward is a new prompt."""
        self.store: Store | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.columns = 0
        self.is_cut = False
        self.prompt_over = False
        self.cut_from: list[int] | None = None
        self.record_past = False
        self.lookahead: tuple[Tensor | None, list[int]] = (None, [])  # queries of a draft, and how many of them a row
        self.softmax_scale = 1.0
        self._inv_freq: Tensor | None = None
        self._queries: Tensor | None = None
        self._output: Tensor | None = None  # what attention gave these queries, where a stage looks at it
        self._cosines: list[tuple[Tensor, list[int]]] = []  # mean [B] and tokens of each forward
        self._draft_cosines: tuple[Tensor, list[int]] | None = (
            None  # [B, tokens], real: of a forward that may be cropped
        )
        self._trailing = 0  # last columns that are real in every row
        self._since_cut = 0  # columns behind the cut
        self.new_real: list[int] = []

    # --- what transformers asks

    @property
    def is_initialized(self) -> bool:
        """Whether a prompt is stored."""
        return self.store is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Stored keys as they lie: without the room behind them, or packed with it."""
        return None if self.store is None else self.store.view()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Stored values likewise."""
        return None if self.store is None else self.store.view()[1]

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens can be taken back: nothing is evicted while decoding."""
        return self.pipeline is None or not self.pipeline.evicts_later

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first prompt says what there is to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Holds the new tokens until their attention, which stores them: only it knows queries and padding."""
        if self.store is not None and self.store.batch != key_states.shape[0]:
            raise ValueError(
                f"CompressedCache: batch must be {self.store.batch}, as the cache holds, got {key_states.shape[0]}; "
                "call cache.reset() for a new batch"
            )
        self.pending = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Entries during a forward of `query_length` tokens, and the offset that lets a shared mask end at its last token."""
        physical = 0 if self.store is None else self.store.max_length
        return physical + query_length, self.columns - physical

    # --- a forward

    @property
    def wants_residual(self) -> bool:
        """Whether `observe` waits for this forward's residual stream."""
        return self.pipeline is not None and self.pipeline.wants_residual and not self.prompt_over

    @property
    def is_complete(self) -> bool:
        """Nothing was ever dropped."""
        return self.store is not None and self.store.is_complete

    def prompt(
        self,
        query: Tensor,
        rows: Rows | None,
        scale: float,
        inv_freq: Tensor | None,
        *,
        cut: bool,
        attended: Tensor | None = None,
    ) -> Tensor:
        """A forward of the prompt: attends in full, then stores everything, or what the cut leaves of it.

        `attended` is what the attention of a first forward gives, where that is known; `query` may then be the last ones only.
        """
        key, value, real = self._take(rows)
        self.softmax_scale, self._inv_freq, self.is_cut = scale, inv_freq, False
        if self.store is None:
            lengths = real or [key.shape[2]] * key.shape[0]
            out, lse, output = attended, None, None  # what was read before kept neither
            if out is None:
                out, lse = self._attend_prompt(query, key, value, [key.shape[2] - n for n in lengths], cut)
                output = out.detach()
            self._advance(key.shape[2], real)
            if cut:  # straight from the fresh K and V: the full ones are never copied
                self._cut(key.detach(), value.detach(), query.detach(), lengths, lse=lse, output=output)
            else:
                self.store = DenseStore.from_prefill(key.detach(), value.detach(), lengths, reserve=self.reserve)
            if not cut or (self.is_complete and self.pipeline is not None and self.pipeline.may_keep_all(lengths)):
                self._keep_queries(query.detach(), output, real)
        else:
            self.store.append(key.detach(), value.detach(), real)
            out = self._attend(query)
            self._advance(key.shape[2], real)
            self._keep_queries(query.detach(), out.detach(), real)
            if cut:
                self._cut_stored()
        return out

    def decode(self, query: Tensor, rows: Rows | None, scale: float, inv_freq: Tensor | None) -> Tensor:
        """A forward after the prompt: one token, a new turn, or drafts."""
        key, value, real = self._take(rows)
        assert self.store is not None
        if self.pipeline is not None:
            self.pipeline.make_room(self.store, self.new_real)
        self.store.append(key.detach(), value.detach(), real)
        if self.pipeline is not None:
            self.pipeline.prepare(self.store, inv_freq)
        self.softmax_scale = scale
        if self.pipeline is None:
            out = self._attend(query)
        else:
            out = self.pipeline.attend(self.store, query, softmax_scale=scale, real=real)
            self.pipeline.evict(self.store)
        self._advance(key.shape[2], real)
        return out

    def _attend_prompt(
        self, query: Tensor, key: Tensor, value: Tensor, starts: list[int], cut: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of a whole prompt, with its log-sum-exp if the cut behind it looks at that."""
        if cut and self.pipeline is not None and self.pipeline.wants_lse:
            return attend_with_lse(query, key, value, softmax_scale=self.softmax_scale, starts=starts)
        return attend(query, key, value, softmax_scale=self.softmax_scale, starts=starts), None

    def _attend(self, query: Tensor) -> Tensor:
        assert self.store is not None
        return self.store.attend(query, softmax_scale=self.softmax_scale)

    def _take(self, rows: Rows | None) -> tuple[Tensor, Tensor, list[int] | None]:
        """The tokens that `update` holds, and how many of them are real in each row (None: all)."""
        assert self.pending is not None, "attention runs right after update"
        (key, value), self.pending = self.pending, None
        new = key.shape[2]
        if rows is None:
            self.new_real = [new] * key.shape[0]
            return key, value, None
        seen = [0] * key.shape[0] if self.store is None else self.store.seen
        if rows.columns != self.columns + new:
            raise ValueError(
                f"CompressedCache: attention_mask must be [batch, {self.columns + new}], all tokens so far and the new ones, "
                f"got {rows.columns} columns"
            )
        if not rows.left_padded:
            raise ValueError(
                "CompressedCache: attention_mask must pad on the left, got padding behind a token of its row"
            )
        if [total - n for total, n in zip(rows.total, rows.new)] != seen:
            old = [total - n for total, n in zip(rows.total, rows.new)]
            raise ValueError(
                f"CompressedCache: attention_mask must count the tokens that the cache has seen, {seen} a row, got {old}"
            )
        self.new_real = rows.new
        return key, value, None if min(rows.new, default=new) == new else rows.new

    def _advance(self, new: int, real: list[int] | None) -> None:
        self.columns += new
        self._since_cut += new
        self._trailing = self._trailing + new if real is None else min(real, default=0)

    # --- the end of the prompt

    def _keep_queries(self, query: Tensor, output: Tensor | None, real: list[int] | None) -> None:
        """Keeps the last real queries of each row for a later cut, and what attention gave them if that is looked at."""
        if self.pipeline is None or self.pipeline.queries == 0:
            return
        keep = self.pipeline.queries + (_MAX_DRAFTS if self.record_past else 0)
        starts_anew = self._queries is None
        self._queries = last_columns(self._queries, query, real, keep)
        if output is None or not self.pipeline.wants_output or (self._output is None and not starts_anew):
            self._output = None
        else:
            self._output = last_columns(self._output, output, real, keep)

    def finish_prompt(self) -> None:
        """No later forward belongs to the prompt: makes the cut if it is still to come."""
        if self.pipeline is not None and self.store is not None and not self.is_cut:
            self._cut_stored()
            self._report()
        self.prompt_over, self.record_past = True, False
        self._queries, self._output, self._cosines, self._draft_cosines = None, None, [], None
        self.lookahead = None, []

    def _cut_stored(self) -> None:
        store = self.store
        assert store is not None
        self._cut(*store.prompt(), self._queries, store.seen, store, output=self._output)

    def _cut(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        lengths: list[int],
        store: Store | None = None,
        *,
        lse: Tensor | None = None,
        output: Tensor | None = None,
    ) -> None:
        assert self.pipeline is not None
        state = self._state(keys, values, queries, lengths, lse=lse, output=output)
        self.store = self.pipeline.compress(state, store)
        self.is_cut, self.cut_from, self._since_cut = True, list(lengths), 0

    def _state(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        lengths: list[int],
        *,
        lse: Tensor | None = None,
        output: Tensor | None = None,
    ) -> LayerState:
        """The prompt so far as the stages see it; `lse` and `output` go with the queries."""
        assert self.pipeline is not None
        start = None
        if min(lengths, default=0) < keys.shape[2]:
            start = torch.tensor([keys.shape[2] - n for n in lengths], dtype=torch.int32, device=keys.device)
        wanted = self.pipeline.queries

        def last(t: Tensor | None) -> Tensor | None:
            return None if t is None or wanted == 0 else t[:, :, -wanted:]

        return LayerState(
            index=self.index,
            num_layers=self.num_layers,
            queries=last(queries),
            keys=keys,
            values=values,
            lengths=list(lengths),
            softmax_scale=self.softmax_scale,
            seq_start=start,
            lse=last(lse),
            output=last(output),
            inv_freq=self._inv_freq,
            lookahead=self.lookahead[0],
            lookahead_lengths=self.lookahead[1],
        )

    def adopt(self, whole: CompressedLayer, pipeline: Pipeline) -> None:
        """Goes on behind the prompt of `whole`, which stays as it is, over what `pipeline` keeps of it."""
        store = whole.store
        assert store is not None
        state = whole._state(*store.prompt(), whole._queries, store.seen, output=whole._output)
        self.pipeline = pipeline
        self.store = pipeline.compress(state)
        self.columns, self.softmax_scale, self._inv_freq = whole.columns, whole.softmax_scale, whole._inv_freq
        self.is_cut, self.prompt_over, self.cut_from = True, True, list(store.seen)

    def observe(self, before: Tensor, update: Tensor) -> None:
        """Takes the residual stream around this layer's attention in the forward that just ran."""
        if not self.wants_residual:
            return
        real, tokens = self.new_real, before.shape[1]
        self._fold_drafts()
        if not self.is_cut and self.record_past:
            last = min(tokens, _MAX_DRAFTS)
            pairs = [t[:, tokens - last :].reshape(-1, 1, t.shape[2]) for t in (before, update)]
            single = cosine_importance(*pairs, is_update=True).view(-1, last)
            self._draft_cosines = (single, [min(n, last) for n in real])
            tokens -= last
            before, update, real = before[:, :tokens], update[:, :tokens], [max(0, n - last) for n in real]
        if tokens:
            start = None
            if min(real) < tokens:
                start = torch.tensor([tokens - n for n in real], dtype=torch.int32, device=before.device)
            self._cosines.append((cosine_importance(before, update, seq_start=start, is_update=True), real))
        if self.is_cut:
            self._report()

    def _fold_drafts(self) -> None:
        """The cosines of single tokens become one more mean, now that no crop can take any of them back."""
        if self._draft_cosines is None:
            return
        (cosines, real), self._draft_cosines = self._draft_cosines, None
        means = [row[cosines.shape[1] - n :].mean() for row, n in zip(cosines, real)]  # NaN where n is 0
        self._cosines.append((torch.stack(means), real))

    def _report(self) -> None:
        """Hands the token-weighted mean cosine of the prompt so far to the pipeline."""
        self._fold_drafts()
        if not self.wants_residual or not self._cosines:
            return
        assert self.pipeline is not None
        means, counts = zip(*self._cosines)
        mean = means[0]
        if len(means) > 1:
            weight = torch.tensor(counts, dtype=torch.float32, device=mean.device)
            summed = torch.where(weight > 0, torch.stack(means) * weight, 0).sum(0)
            mean = summed / weight.sum(0)
        self.pipeline.observe_residual(self.index, mean)

    # --- drafts

    def activate_past_recording(self) -> None:
        """Drafts may follow: the cut waits for the first `crop`."""
        if not self.is_croppable:
            raise NotImplementedError(
                "CompressedCache: this method evicts entries while decoding, so rejected drafts cannot be taken back; "
                "generate without an assistant, or use a method that cuts once"
            )
        self.record_past = not self.prompt_over

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens."""
        tokens = -int(tokens_to_remove)
        if tokens < 0:
            raise ValueError(
                f"CompressedCache.crop: tokens_to_remove must be at most 0 (-n takes n back), got {-tokens}"
            )
        if tokens == 0 or self.store is None:
            return
        limit = self._trailing if self.is_complete else min(self._trailing, self._since_cut)
        if not self.is_croppable or tokens > limit:
            raise ValueError(
                f"CompressedCache.crop: tokens_to_remove must be at least -{limit if self.is_croppable else 0}, the tokens that "
                f"came after the cut, got {-tokens}"
            )
        self.store.crop(tokens)
        self.columns -= tokens
        self._trailing -= tokens
        self._since_cut = max(0, self._since_cut - tokens)
        if self.prompt_over or self.pipeline is None:
            return
        if self._queries is not None:
            left = self._queries.shape[2] - tokens
            if left < min(self.pipeline.queries, self.columns):
                raise ValueError(
                    f"CompressedCache.crop: tokens_to_remove must be at least -{_MAX_DRAFTS} in the prompt's own forward, and "
                    f"follow activate_past_recording(), got {-tokens}"
                )
            self._queries = self._queries[:, :, :left]
            self._output = None if self._output is None else self._output[:, :, :left]
        if self._draft_cosines is not None:
            cosines, real = self._draft_cosines
            self._draft_cosines = (cosines[:, : cosines.shape[1] - tokens], [max(0, n - tokens) for n in real])

    # --- the batch, devices

    def select_rows(self, rows: Tensor, picked: list[int]) -> None:
        """Row i becomes the old row ``rows[i]``; `picked` is the same on the host."""
        if self.store is None:
            return
        self.store.select_rows(rows, picked)
        if self._queries is not None:
            self._queries = self._queries.index_select(0, rows.to(self._queries.device))
        if self._output is not None:
            self._output = self._output.index_select(0, rows.to(self._output.device))
        self._fold_drafts()
        self._cosines = [(t.index_select(0, rows.to(t.device)), [n[i] for i in picked]) for t, n in self._cosines]
        self.cut_from = None if self.cut_from is None else [self.cut_from[i] for i in picked]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The rows that beam search goes on with."""
        self.select_rows(beam_idx, beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.store is not None:
            self.batch_select_indices(torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.select_rows(indices, indices.tolist())

    def offload(self) -> None:
        """Moves the entries to the CPU."""
        if self.store is not None:
            self._home = self.store.keys.device
            self.store.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Moves them back."""
        if self.store is not None and self.store.keys.device != getattr(self, "_home", self.store.keys.device):
            self.store.to(self._home, non_blocking=True)

    # --- size

    @property
    def nbytes(self) -> int:
        """Bytes that this layer holds, room and waiting queries included."""
        waiting = sum(t.untyped_storage().nbytes() for t in (self._queries, self._output) if t is not None)
        return waiting + (0 if self.store is None else self.store.nbytes)

    # --- saving

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers of `load_state_dict`."""
        self._fold_drafts()
        state = {} if self.store is None else {f"store.{k}": t for k, t in self.store.state_dict().items()}
        if self._queries is not None:
            state["queries"] = self._queries
        if self._output is not None:
            state["output"] = self._output
        for i, (mean, tokens) in enumerate(self._cosines):
            state[f"cosines.{i}"], state[f"cosine_tokens.{i}"] = mean, torch.tensor(tokens)
        at_work = self.pipeline is not None and (
            self.pipeline.evicts_later or (not self.prompt_over and self.is_complete)
        )
        kind = None if self.store is None else self.store.kind
        names = ("columns", "is_cut", "prompt_over", "cut_from", "softmax_scale", "_trailing", "_since_cut")
        numbers = {name: getattr(self, name) for name in names}
        return state, {"kind": "compressed", "store": kind, "needs_method": at_work, **numbers}

    def load_state_dict(self, state: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.reset()
        prefix = "store."
        stored = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
        self.store = load_store(numbers.get("store", "dense"), stored, reserve=self.reserve) if stored else None
        self._queries, self._output = state.get("queries"), state.get("output")
        for i in range(sum(name.startswith("cosines.") for name in state)):
            self._cosines.append((state[f"cosines.{i}"], state[f"cosine_tokens.{i}"].tolist()))
        for name, number in numbers.items():
            if name not in ("kind", "store", "needs_method"):
                setattr(self, name, number)
