"""The order of the stages and the moments they run at. Knows no method by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from kvcompress.budget import Budget, Targets
from kvcompress.cache import DenseStore, Store
from kvcompress.heads import AdaptiveHeads, HeadBudget
from kvcompress.layer import LayerState
from kvcompress.lookahead import Lookahead
from kvcompress.ragged import RaggedStore
from kvcompress.select import topk_ragged
from kvcompress.statistic import FixedStatistic, Statistic
from kvcompress.when import EveryStep, Prefill, When

__all__ = ["Pipeline", "Stages", "is_mass"]

_SPARE = 8  # waiting layers are cut again once together they hold an eighth more than their bounds


class Score(Protocol):
    """LayerState -> ``[batch, heads, seq_len]`` float32, higher = keep, +inf = must keep, -inf = padding.

    `queries` is how many of the last prompt queries it looks at. `by_position` says that the score is the position itself, so
    that entries appended later are ranked like the first ones; other scores know nothing of later entries, but those that have
    ``while_decoding = True`` can be asked again over what is left (`kvcompress.statistic.Rescored`). `is_mass`, where a
    score has it, says that scores are never negative and that shares of their sum mean something; `wants_lse` and
    `wants_output`, that the log-sum-exp or the output of the prompt's own attention saves it work (`LayerState`).
    """

    @property
    def by_position(self) -> bool: ...

    @property
    def queries(self) -> int: ...

    def __call__(self, layer: LayerState) -> Tensor: ...


def is_mass(score: Score) -> bool:
    """Whether shares of the score's sum mean something; a score that does not say so has none."""
    return getattr(score, "is_mass", False)


class Select(Protocol):
    """Scores and counts -> ascending index ``[batch, heads, k]`` int32, -1 behind each row's count.

    `forced` is how many entries it keeps whatever their score, so the least budget it accepts. `raised` marks them in the scores,
    for heads that compete with each other.
    """

    @property
    def forced(self) -> int: ...

    def __call__(
        self, scores: Tensor, counts: Sequence[int], *, seq_start: Tensor | None = None, seq_end: Tensor | None = None
    ) -> Tensor: ...

    def raised(
        self, scores: Tensor, counts: Sequence[int], *, seq_start: Tensor | None = None, seq_end: Tensor | None = None
    ) -> Tensor: ...


class Attend(Protocol):
    """Changes stored keys for the coming attention, e.g. re-rotates sinks; most methods have none.

    `inv_freq` is the model's rotary frequencies, ``[rotary_dim / 2]`` float32.
    """

    def prepare(self, store: Store, inv_freq: Tensor) -> None: ...


@dataclass(frozen=True)
class Stages:
    """What a method is made of: one answer for each question. Any combination that is not refused here runs."""

    score: Score
    budget: Budget
    select: Select
    when: When = field(default_factory=Prefill)
    attend: Attend | None = None
    reuse: int = 1  # layers that rank by the scores of the first of them
    heads: HeadBudget | None = None  # how a layer's entries are split over its heads; None: equally
    decode: Statistic | None = None  # what later evictions rank by; None: the score, which then is the position
    reselect: Select | None = None  # how later evictions select; None: as the first
    lookahead: Lookahead | None = None  # a draft whose queries the score looks at; the cut waits for it

    @property
    def is_ragged(self) -> bool:
        """Whether heads keep different numbers of entries."""
        return self.heads is not None or self.budget.across_heads

    def __post_init__(self) -> None:
        if self.budget.needs_mass and not is_mass(self.score):
            raise ValueError(
                f"Stages: score must be a mass, never negative, for {type(self.budget).__name__}, which compares shares of its "
                f"sum, got {type(self.score).__name__}"
            )
        if isinstance(self.heads, AdaptiveHeads) and self.heads.normalise and not is_mass(self.score):
            raise ValueError(
                "Stages: score must be a mass, never negative, for heads that are normalised by shares of its sum, got "
                f"{type(self.score).__name__}"
            )
        if self.heads is not None and self.budget.across_heads:
            raise ValueError(
                f"Stages: heads must be None for a budget that counts for each head itself, got {type(self.heads).__name__} "
                f"with {type(self.budget).__name__}"
            )
        if self.is_ragged and isinstance(self.when, EveryStep) and not isinstance(self.decode, FixedStatistic):
            raise ValueError(
                "Stages: when must be Prefill for heads of different counts, which no eviction at a later step keeps up without a "
                "statistic that knows slots in no order, got EveryStep"
            )
        if self.is_ragged and self.decode is not None and self.budget.deferred:
            raise ValueError(
                "Stages: budget must not wait for all layers where heads of different counts evict later, whose numbers do not "
                f"move with a second cut, got {type(self.budget).__name__}"
            )
        if self.is_ragged and self.attend is not None:
            raise ValueError(
                "Stages: attend must be None for heads of different counts, whose entries have no common slots to move, "
                f"got {type(self.attend).__name__}"
            )
        if self.reuse < 1:
            raise ValueError(f"Stages: reuse must be at least 1 layer, got {self.reuse}")
        if isinstance(self.when, EveryStep) and self.decode is None and not self.score.by_position:
            raise ValueError(
                "Stages: when must be Prefill for a score that cannot rank tokens appended later, got EveryStep with "
                f"{type(self.score).__name__}"
            )
        if isinstance(self.when, Prefill) and self.decode is not None:
            raise ValueError(
                "Stages: when must be EveryStep for a statistic of the decoding steps, got Prefill with "
                f"{type(self.decode).__name__}"
            )
        if self.decode is not None and self.attend is not None:
            raise ValueError(
                "Stages: attend must be None where a statistic attends, got "
                f"{type(self.attend).__name__} with {type(self.decode).__name__}"
            )


@dataclass(frozen=True)
class _Ranked:
    """What a layer's entries are chosen by: scores of its whole prompt where heads differ, 4 bytes an entry; else None."""

    index: int
    lengths: list[int]
    seq_start: Tensor | None
    scores: Tensor | None


@dataclass(frozen=True)
class _Packed:
    """Picked entries of a prompt, head after head: entry j of head r as ``r * seq_len + j``, so in one ascending list.

    Attributes:
        keys: ``[total]`` int64.
        indptr: ``[rows * heads + 1]`` int32, where each head's part begins.
    """

    keys: Tensor
    indptr: Tensor

    @classmethod
    def of(cls, index: Tensor, indptr: Tensor, seq_len: int) -> _Packed:
        """From the packed columns of `topk_ragged`."""
        first = seq_len * torch.arange(indptr.shape[0] - 1, device=index.device)
        return cls(index + first.repeat_interleave(indptr.diff(), output_size=index.shape[0]), indptr)

    def among(self, held: _Packed, seq_len: int) -> Tensor:
        """Where these entries stand among those of their head that are `held`, which they are part of: ``[total]`` int32."""
        return (torch.searchsorted(held.keys, self.keys) - held.indptr[self.keys // seq_len]).int()


@dataclass(frozen=True)
class _Unsettled:
    """A layer that holds an upper bound of its budget.

    Attributes:
        bound: that bound, entries a head, summed over the rows.
        held: which entries of the prompt it holds, where heads differ.
    """

    store: Store
    ranked: _Ranked
    bound: int
    held: _Packed | None = None


def _each(row: int | list[int]) -> list[int]:
    return row if isinstance(row, list) else [row]


def _mean(row: int | list[int]) -> int:
    """Mean entries a head of a row's target, rounded up."""
    return -(-sum(row) // len(row)) if isinstance(row, list) else row


def _entries(targets: Targets, lengths: Sequence[int]) -> int:
    """Mean entries a head that a layer may keep, summed over the rows."""
    return sum(min(_mean(row), length) for row, length in zip(targets, lengths))


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
        self._unsettled: dict[int, _Unsettled] = {}
        self._shared: Tensor | None = None

    @property
    def queries(self) -> int:
        """How many of the last prompt queries the loop must hand over."""
        stages = self.stages
        decode = 0 if stages.decode is None else stages.decode.queries
        draft = 0 if stages.lookahead is None else stages.lookahead.queries
        return max(stages.score.queries, stages.budget.queries, decode, draft)

    @property
    def wants_lse(self) -> bool:
        """Whether some stage is spared a pass over K by the log-sum-exp of the prompt's attention."""
        return self._some_stage("wants_lse")

    @property
    def wants_output(self) -> bool:
        """Whether some stage looks at what the prompt's attention gave the queries."""
        return self._some_stage("wants_output")

    def _some_stage(self, says: str) -> bool:
        stages = self.stages
        return any(getattr(stage, says, False) for stage in (stages.score, stages.budget, stages.decode))

    @property
    def wants_residual(self) -> bool:
        """Whether `observe_residual` must be called for every layer."""
        return self.stages.budget.wants_residual

    def may_keep_all(self, lengths: Sequence[int]) -> bool:
        """Whether a store that holds all of these rows may stay so: a deferred budget first keeps more than it will."""
        budget = self.stages.budget
        return not budget.deferred or all(budget.keeps_all(n) for n in lengths)

    @property
    def evicts_later(self) -> bool:
        """Whether entries are dropped after the prefill, so that rejected drafts cannot be taken back."""
        return isinstance(self.stages.when, EveryStep)

    # --- prefill

    @property
    def is_waiting(self) -> bool:
        """Whether layers are cut to an upper bound only, because not all of them have been measured."""
        return bool(self._unsettled)

    def compress(self, layer: LayerState, store: Store | None = None) -> Store:
        """Scores, cuts and stores a layer whose prefill attention is done. Its full K and V can be freed afterwards.

        `store` holds the same prompt already, if the loop kept it as one (it came in chunks): it is returned as it is if
        nothing is dropped.
        """
        budget = self.stages.budget
        if layer.index % self.stages.reuse == 0:
            self._shared = None  # of another group, or another prompt
        scores = functools.cache(lambda: self._score(layer))
        is_measured = budget.deferred and not budget.wants_residual
        bounds: dict[int, Targets]
        if is_measured:
            self._measured[layer.index] = budget.measure(layer, self._raised(layer, scores))
            bounds = dict(enumerate(self._settled(layer.index + 1, layer.lengths)))
        else:
            bounds = {layer.index: self._at_least_forced(budget.first(layer, scores))}
        final = not budget.deferred or (is_measured and len(bounds) == self.num_layers)
        store, held = self._cut(layer, scores, bounds[layer.index], store, final=final)
        if self.stages.decode is not None:
            assert isinstance(store, (DenseStore, RaggedStore))
            self.stages.decode.start(
                layer, store, lambda stage: scores() if stage == self.stages.score else stage(layer)
            )
        if budget.deferred:
            ranked = _Ranked(
                layer.index, list(layer.lengths), layer.seq_start, scores() if self.stages.is_ragged else None
            )
            bound = _entries(bounds[layer.index], layer.lengths)
            self._unsettled[layer.index] = _Unsettled(store, ranked, bound, held)
        if is_measured:
            self._bring_down(bounds)
        return store

    def observe_residual(self, index: int, importance: Tensor) -> None:
        """Takes the mean cosine ``[batch]`` of layer `index`, which has been compressed (see `kvcompress.cosine_importance`)."""
        if index not in self._unsettled:
            return
        self._measured[index] = importance
        self._bring_down(dict(enumerate(self._settled(index + 1, self._unsettled[index].ranked.lengths))))

    def _bring_down(self, bounds: dict[int, Targets]) -> None:
        """Cuts the waiting layers down to bounds that have come down, or, once all are measured, to the final budgets."""
        if len(bounds) < self.num_layers:
            self._tighten(bounds)
            return
        for index, targets in bounds.items():
            self._cut_again(index, targets, final=True)
        self.reset()

    def _tighten(self, bounds: dict[int, Targets]) -> None:
        """Cuts waiting layers down to bounds that have come down, those with most to give first, until what is spare is little."""
        lengths = self._unsettled[0].ranked.lengths
        wanted = {index: _entries(targets, lengths) for index, targets in bounds.items()}
        beyond = {index: self._unsettled[index].bound - n for index, n in wanted.items()}
        spare, most = sum(beyond.values()), sum(wanted.values()) // _SPARE
        for index in sorted(beyond, key=lambda i: -beyond[i]):
            if spare <= most:
                break
            self._cut_again(index, bounds[index], final=False)
            spare -= beyond[index]

    def _kept(self, length: int, target: int) -> int:
        """Entries that the prefill leaves of a prompt."""
        when = self.stages.when
        waits = isinstance(when, EveryStep) and when.keeps_prompt(length, target)
        return length if waits else min(length, target)

    def _at_least_forced(self, targets: Targets) -> Targets:
        forced = self.stages.select.forced
        return [[max(n, forced) for n in row] if isinstance(row, list) else max(row, forced) for row in targets]

    def _score(self, layer: LayerState) -> Tensor:
        """The layer's scores, or those that a layer before it in its group of `reuse` layers has computed."""
        if self._shared is not None:
            return self._shared.to(layer.device)
        scores = self.stages.score(layer)
        if self.stages.reuse > 1:
            self._shared = scores
        return scores

    def _raised(self, layer: LayerState, scores: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Scores as a budget measures them: where all heads compete, forced entries are +inf."""
        if not self.stages.budget.across_heads:
            return scores
        return lambda: self.stages.select.raised(scores(), layer.lengths, seq_start=layer.seq_start)

    def _settled(self, count: int, lengths: list[int]) -> Sequence[Targets]:
        """What the budget makes of the first `count` layers' measurements: final for all layers, else upper bounds."""
        budget, floor = self.stages.budget, self.stages.select.forced
        if budget.across_heads:
            measured = [self._measured[i] for i in range(count)]
            return budget.settle_heads(measured, lengths, layers=self.num_layers, floor=floor)
        for i in range(count):  # the one wait for the device, once a layer
            self._measured[i] = self._measured[i].cpu()
        return budget.settle([self._measured[i] for i in range(count)], lengths, layers=self.num_layers, floor=floor)

    # --- cuts

    def _cut(
        self, layer: LayerState, scores: Callable[[], Tensor], targets: Targets, store: Store | None, *, final: bool
    ) -> tuple[Store, _Packed | None]:
        """A layer's first cut: to its budget, or to the upper bound of a budget that is not final."""
        held = None
        counts = [self._kept(length, _mean(row)) for row, length in zip(targets, layer.lengths)]
        fits = all(n >= length for row, length in zip(targets, layer.lengths) for n in _each(row))
        if not self.stages.is_ragged and counts == layer.lengths:
            fits = True
        if fits and not self.stages.budget.deferred:  # nothing to drop
            # who goes on evicting by query head stores by query head from the start
            heads = layer.keys.shape[1] if self.stages.decode is None else scores().shape[1]
            if store is None or heads != store.keys.shape[1]:
                store = DenseStore.from_prefill(
                    layer.keys, layer.values, layer.lengths, reserve=self.reserve, heads=heads
                )
        elif self.stages.is_ragged:
            ranked = _Ranked(layer.index, list(layer.lengths), layer.seq_start, scores())
            raised, per_head, total = self._split(ranked, targets, final=final)
            index, indptr = topk_ragged(raised, per_head, total=total, seq_start=layer.seq_start)
            if self.stages.budget.deferred:
                held = _Packed.of(index, indptr, layer.seq_len)
            store = RaggedStore.gathered(layer.keys, layer.values, index, indptr, layer.lengths, reserve=self.reserve)
        else:
            keeps_scores = not final and not self.stages.score.by_position
            store = DenseStore.gathered(
                layer.keys,
                layer.values,
                self.stages.select(scores(), counts, seq_start=layer.seq_start),
                counts,
                layer.lengths,
                scores=scores() if keeps_scores else None,
                reserve=self.reserve,
            )
        store.targets = self._targets(targets, store, final=final)
        return store, held

    def _targets(self, targets: Targets, store: Store, *, final: bool) -> list[int]:
        """What a store may hold a head; heads that are rounded one by one may pass the budget by a few."""
        rows = [_mean(row) for row in targets]
        is_exact = self.stages.heads is None or self.stages.heads.is_exact
        return rows if is_exact or not final else [max(n, held) for n, held in zip(rows, store.lengths)]

    def _split(
        self, ranked: _Ranked, targets: Targets, *, final: bool, held: Tensor | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """Scores in which forced entries are +inf, the entries of each head on the device, and all of them on the host.

        `held` ``[batch * heads]`` is what an earlier cut left of each head, for heads that would like some of it back.
        """
        assert ranked.scores is not None
        counts = [min(_mean(row), length) for row, length in zip(targets, ranked.lengths)]
        raised = self.stages.select.raised(ranked.scores, counts, seq_start=ranked.seq_start)
        heads = self.stages.heads
        if heads is None:
            rows = [[min(n, length) for n in _each(row)] for row, length in zip(targets, ranked.lengths)]
            return raised, torch.tensor(rows, dtype=torch.int32, device=raised.device), sum(map(sum, rows))
        per_head = (heads if final else heads.bound)(raised, counts, layer=ranked.index)
        is_known = heads.is_exact if final else heads.is_exact_bound
        if held is not None and not heads.is_nested:
            per_head, is_known = per_head.minimum(held.view_as(per_head)), False
        return raised, per_head, raised.shape[1] * sum(counts) if is_known else int(per_head.sum())

    def _cut_again(self, layer: int, targets: Targets, *, final: bool) -> None:
        """A waiting layer down to its final budget, or to a bound that has come down."""
        waiting = self._unsettled[layer]
        store, ranked, bound = waiting.store, waiting.ranked, _entries(targets, waiting.ranked.lengths)
        self._unsettled[layer] = replace(waiting, bound=bound)
        if isinstance(store, RaggedStore):
            assert ranked.scores is not None
            assert waiting.held is not None
            raised, per_head, total = self._split(ranked, targets, final=final, held=store.row_lengths)
            index, indptr = topk_ragged(raised, per_head, total=total, seq_start=ranked.seq_start)
            kept = _Packed.of(index, indptr, raised.shape[2])
            store.keep(kept.among(waiting.held, raised.shape[2]), indptr)
            self._unsettled[layer] = replace(waiting, bound=bound, held=kept)
            store.targets = self._targets(targets, store, final=final)
            return
        store.targets = [_mean(row) for row in targets]
        self.fit(store, store.targets)
        if final:
            store.scores = None

    # --- later

    def is_within(self, store: Store) -> bool:
        """Whether no row of a compressed prompt holds more than its budget, or than a later eviction waits for."""
        return store.targets is not None and all(
            length <= self._kept(length, target) for length, target in zip(store.lengths, store.targets)
        )

    def make_room(self, store: Store, new: int | Sequence[int]) -> None:
        """Before `new` tokens are stored (of each row, where rows get differently many), where eviction comes before attention."""
        when = self.stages.when
        if isinstance(when, EveryStep) and when.before_attention and store.targets is not None:
            counted = [new] * store.batch if isinstance(new, int) else list(new)
            self.fit(
                store, self._due(when, store, counted if when.counts_new else [0] * store.batch), self.stages.reselect
            )

    def prepare(self, store: Store, inv_freq: Tensor | None) -> None:
        """After the new tokens are stored, before they attend."""
        if self.stages.attend is not None:
            if inv_freq is None:
                raise ValueError("Pipeline.prepare: inv_freq must be given for in-cache positions, got None")
            self.stages.attend.prepare(store, inv_freq)

    def attend(self, store: Store, query: Tensor, *, softmax_scale: float, real: Sequence[int] | None = None) -> Tensor:
        """Attention of the tokens just stored; of row b the last ``real[b]`` of them (None: all)."""
        if self.stages.decode is None:
            return store.attend(query, softmax_scale=softmax_scale)
        assert isinstance(store, DenseStore), "heads of different counts evict later in fixed stores only"
        return self.stages.decode.attend(store, query, softmax_scale=softmax_scale, real=real)

    def evict(self, store: Store) -> None:
        """After the attention of a later forward, where eviction comes after it: rows above their budget fall back to it."""
        when = self.stages.when
        if isinstance(when, EveryStep) and not when.before_attention and store.targets is not None:
            self.fit(store, self._due(when, store, [0] * store.batch), self.stages.reselect)

    def _due(self, when: EveryStep, store: Store, counted: Sequence[int]) -> list[int]:
        """Entries that each row may keep: its budget if it is due, else all it has. `counted` tokens of it are still to come."""
        assert store.targets is not None
        targets = [when.target(target, seen) for target, seen in zip(store.targets, store.seen)]
        return [
            max(0, target - new) if when.is_due(length + new, target) else length
            for length, target, new in zip(store.lengths, targets, counted)
        ]

    def fit(self, store: Store, targets: Sequence[int], select: Select | None = None) -> None:
        """Cuts a store to at most `targets` entries a row: by its kept scores, by what was measured, or by recency."""
        assert isinstance(store, DenseStore), "heads of different counts are never cut at later steps"
        counts = [min(target, length) for target, length in zip(targets, store.lengths)]
        if counts == store.lengths:
            return
        if store.scores is not None:
            scores = store.scores
        elif self.stages.decode is not None:
            scores = self.stages.decode.rank(store)
        else:
            scores = store.positions.float()
        select = select or self.stages.select
        seq_end = None if store.is_uniform else store.device_lengths
        index = select(scores[:, :, : store.max_length], counts, seq_end=seq_end)
        store.keep(index, counts)
