"""The order of the stages and the moments they run at. Knows no method by name."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from kvcompress.budget import Budget
from kvcompress.cache import DenseStore
from kvcompress.layer import LayerState
from kvcompress.when import EveryStep, Prefill, When

__all__ = ["Pipeline", "Stages"]


class Score(Protocol):
    """LayerState -> ``[batch, heads, seq_len]`` float32, higher = keep, +inf = must keep, -inf = padding.

    `queries` is how many of the last prompt queries it looks at. `by_position` says that the score is the position itself, so
    that entries appended later are ranked like the first ones; other scores know nothing of later entries.
    """

    @property
    def by_position(self) -> bool: ...

    @property
    def queries(self) -> int: ...

    def __call__(self, layer: LayerState) -> Tensor: ...


class Select(Protocol):
    """Scores and counts -> ascending index ``[batch, heads, k]`` int32, -1 behind each row's count.

    `forced` is how many entries it keeps whatever their score, so the least budget it accepts.
    """

    @property
    def forced(self) -> int: ...

    def __call__(
        self, scores: Tensor, counts: Sequence[int], *, seq_start: Tensor | None = None, seq_end: Tensor | None = None
    ) -> Tensor: ...


class Attend(Protocol):
    """Changes stored keys for the coming attention, e.g. re-rotates sinks; most methods have none.

    `inv_freq` is the model's rotary frequencies, ``[rotary_dim / 2]`` float32.
    """

    def prepare(self, store: DenseStore, inv_freq: Tensor) -> None: ...


@dataclass(frozen=True)
class Stages:
    """What a method is made of: one answer for each question. Any combination that type-checks here runs."""

    score: Score
    budget: Budget
    select: Select
    when: When = field(default_factory=Prefill)
    attend: Attend | None = None
    reuse: int = 1  # layers that rank by the scores of the first of them

    def __post_init__(self) -> None:
        if self.reuse < 1:
            raise ValueError(f"Stages: reuse must be at least 1 layer, got {self.reuse}")
        if isinstance(self.when, EveryStep) and not self.score.by_position:
            raise ValueError(
                "Stages: when must be Prefill for a score that cannot rank tokens appended later, got EveryStep with "
                f"{type(self.score).__name__}"
            )


class Pipeline:
    """Runs the stages over the layers of a model, for one batch of sequences.

    A model loop calls `compress` for each layer at the end of its own prefill attention and `observe_residual` where
    the budget asks for it (`wants_residual`); in later forwards `make_room`, then stores the new tokens, `prepare`,
    attends, and `evict`. A store that `compress` returned may shrink until the last layer has been compressed.
    """

    def __init__(self, stages: Stages, num_layers: int, *, reserve: int = 128) -> None:
        self.stages = stages
        self.num_layers = num_layers
        self.reserve = reserve
        self.reset()

    def reset(self) -> None:
        """Forgets all measurements: the next prompt is a new one."""
        self._measured: dict[int, Tensor] = {}
        self._unsettled: dict[int, DenseStore] = {}
        self._shared: Tensor | None = None

    @property
    def queries(self) -> int:
        """How many of the last prompt queries the loop must hand over."""
        return max(self.stages.score.queries, self.stages.budget.queries)

    @property
    def wants_residual(self) -> bool:
        """Whether `observe_residual` must be called for every layer."""
        return self.stages.budget.wants_residual

    @property
    def evicts_later(self) -> bool:
        """Whether entries are dropped after the prefill, so that rejected drafts cannot be taken back."""
        return isinstance(self.stages.when, EveryStep)

    # --- prefill

    @property
    def is_waiting(self) -> bool:
        """Whether layers are cut to an upper bound only, because not all of them have been measured."""
        return bool(self._unsettled)

    def compress(self, layer: LayerState, store: DenseStore | None = None) -> DenseStore:
        """Scores, cuts and stores a layer whose prefill attention is done. Its full K and V can be freed afterwards.

        `store` holds the same prompt already, if the loop kept it as one (it came in chunks): it is returned as it is if
        nothing is dropped.
        """
        budget, select = self.stages.budget, self.stages.select
        if layer.index % self.stages.reuse == 0:
            self._shared = None  # of another group, or another prompt
        scores = functools.cache(lambda: self._score(layer))
        targets = [max(target, select.forced) for target in budget.first(layer, scores)]
        counts = [min(target, length) for target, length in zip(targets, layer.lengths)]
        if counts == layer.lengths and not budget.deferred:  # nothing to drop: nothing is computed
            if store is None:
                store = DenseStore.from_prefill(layer.keys, layer.values, layer.lengths, reserve=self.reserve)
        else:
            store = DenseStore.gathered(
                layer.keys,
                layer.values,
                select(scores(), counts, seq_start=layer.seq_start),
                counts,
                layer.lengths,
                scores=scores() if budget.deferred and not self.stages.score.by_position else None,
                reserve=self.reserve,
            )
        store.targets = targets
        if budget.deferred:
            self._unsettled[layer.index] = store
            if not budget.wants_residual:
                self._measured[layer.index] = budget.measure(layer, scores)
            self._settle()
        return store

    def _score(self, layer: LayerState) -> Tensor:
        """The layer's scores, or those that a layer before it in its group of `reuse` layers has computed."""
        if self._shared is not None:
            return self._shared.to(layer.device)
        scores = self.stages.score(layer)
        if self.stages.reuse > 1:
            self._shared = scores
        return scores

    def observe_residual(self, index: int, importance: Tensor) -> None:
        """Takes the mean cosine ``[batch]`` of layer `index` (see `kvcompress.cosine_importance`)."""
        self._measured[index] = importance
        self._settle()

    def _settle(self) -> None:
        """Once all layers are measured and cut a first time: the final budgets, and the second cut down to them."""
        if len(self._measured) < self.num_layers or len(self._unsettled) < self.num_layers:
            return
        layers = range(self.num_layers)
        measured = [self._measured[i].cpu() for i in layers]  # the one wait for the device: once a prompt
        stores = [self._unsettled[i] for i in layers]
        final = self.stages.budget.settle(measured, stores[0].seen, floor=self.stages.select.forced)
        for store, targets in zip(stores, final):
            store.targets = targets
            self.fit(store, targets)
            store.scores = None
        self.reset()

    # --- later

    def make_room(self, store: DenseStore, new: int) -> None:
        """Before `new` tokens are stored: where eviction comes before attention, only `budget - new` old entries stay."""
        when = self.stages.when
        if isinstance(when, EveryStep) and when.before_attention and store.targets is not None:
            self.fit(store, [max(0, target - new) for target in store.targets])

    def prepare(self, store: DenseStore, inv_freq: Tensor | None) -> None:
        """After the new tokens are stored, before they attend."""
        if self.stages.attend is not None:
            if inv_freq is None:
                raise ValueError("Pipeline.prepare: inv_freq must be given for in-cache positions, got None")
            self.stages.attend.prepare(store, inv_freq)

    def evict(self, store: DenseStore) -> None:
        """After the attention of a later forward: where eviction comes after attention, down to the budget again."""
        when = self.stages.when
        if isinstance(when, EveryStep) and not when.before_attention and store.targets is not None:
            self.fit(store, store.targets)

    def fit(self, store: DenseStore, targets: Sequence[int]) -> None:
        """Cuts a store to at most `targets` entries a row, by its kept scores, or by recency where it has none."""
        counts = [min(target, length) for target, length in zip(targets, store.lengths)]
        if counts == store.lengths:
            return
        scores = store.positions.float() if store.scores is None else store.scores
        index = self.stages.select(scores[:, :, : store.max_length], counts, seq_end=store.device_lengths)
        store.keep(index, counts)
