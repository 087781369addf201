"""Runs questions against compressed caches and writes down what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.cache import DenseStore
from kvcompress.evaluate.reading import Reading, compress_directly, replayable
from kvcompress.evaluate.tasks import Sample, Tokens, by_context, encode
from kvcompress.methods import Method
from kvcompress.models import CompressedCache, attach
from kvcompress.models.layer import CompressedLayer
from kvcompress.when import EveryStep

__all__ = ["Candidate", "Record", "evaluate"]


@dataclass(frozen=True)
class Candidate:
    """A method at a budget, under the name that results carry. `method` None is the full cache."""

    name: str
    method: Method | None
    budget: int | float = 1.0

    def __str__(self) -> str:
        return "full cache" if self.method is None else str(self.method)


@dataclass(frozen=True)
class Record:
    """One question to one candidate.

    Attributes:
        method, parameters, budget: the candidate.
        id, context_id, task, length, depth: the sample, see `Sample`.
        question_visible: the prompt that was compressed held the question (query-aware). Figures of the two kinds are not
            comparable.
        right: greedy decoding gives exactly the answer's tokens.
        tokens_right, tokens: of the answer, each after the right ones before it.
        agreement: share of these tokens at which the full cache has the same first choice.
        kl: mean over these tokens of KL(full || compressed), in nats.
        nll: mean over these tokens of the answer's own negative log-likelihood, in nats; exp of it is the perplexity.
        prompt_tokens: tokens that were compressed.
        entries: kept of them, the mean over layers and heads.
        end_entries: held when the last token of the answer was predicted: what was fed came on top, unless it was evicted again.
        bytes: of the cache after the cut, without room for new tokens.
        prefill_s, compress_s, decode_s: seconds to read the prompt, to compress it, and for each decoded token; None where
            not measured.
        scorer: what the choice was based on.
    """

    method: str
    parameters: str
    budget: int | float
    id: str
    context_id: str
    task: str
    length: int
    depth: float | None
    question_visible: bool
    right: bool
    tokens_right: int
    tokens: int
    agreement: float
    kl: float
    nll: float
    prompt_tokens: int
    entries: float
    end_entries: float
    bytes: int
    prefill_s: float | None
    compress_s: float | None
    decode_s: float | None
    scorer: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured: two records with the same key are the same measurement."""
        return (self.parameters, self.budget, self.id, self.question_visible)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Record:
        return cls(**{field.name: row[field.name] for field in fields(cls)})


def evaluate(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    candidates: Sequence[Candidate],
    *,
    question_visible: Sequence[bool] = (True, False),
    batch: int = 8,
    timed: int = 2,
    done: Set[tuple[Any, ...]] = frozenset(),
    on_step: Callable[[int], None] = lambda _: None,
) -> Iterator[Record]:
    """Asks every question of every candidate, context by context.

    Visible: context and question are compressed, then ``answer_prefix`` and the answer follow. Hidden: the context alone is
    compressed, and all its questions are asked on copies of the same cache. Positions go on from the uncompressed
    length. The prompt attends in full, so it is read once and compressed by every candidate.

    The answer is fed to the model in one pass, all of whose first choices must be right: for methods that cut once that is
    the same as greedy decoding. Methods that evict while decoding are fed token by token.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        samples: questions; those of one context are worked on together.
        candidates: methods with budgets.
        question_visible: which of the two modes.
        batch: most rows (caches, questions) in one forward.
        timed: samples of a candidate, length and mode that are timed: scored afresh and decoded token by token.
        done: keys of records that are there already.
        on_step: is called with the number of measurements that were made or skipped.

    Yields:
        One `Record` a sample, candidate and mode.
    """
    direct = {c for c in candidates if c.method is not None and not replayable(c.method, model.config)}
    clock = _Clock(timed)
    with attach(model), torch.inference_mode():
        for group in by_context(samples):
            todo = [
                (visible, candidate, sample)
                for visible in question_visible
                for candidate in candidates
                for sample in group
                if _key(candidate, sample, visible) not in done
            ]
            on_step(len(group) * len(candidates) * len(question_visible) - len(todo))
            if todo:
                for records in _Context(model, tokenizer, group, candidates, direct, batch, clock).run(todo):
                    yield from records
                    on_step(len(records))


def _key(candidate: Candidate, sample: Sample, visible: bool) -> tuple[Any, ...]:
    return (str(candidate), candidate.budget, sample.id, visible)


class _Clock:
    """Which measurements are timed: the first ones of each kind."""

    def __init__(self, timed: int) -> None:
        self._timed = timed
        self._counts: dict[Any, int] = {}

    def take(self, candidate: Candidate, sample: Sample, visible: bool) -> bool:
        key = (candidate, sample.length, visible)
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key] <= self._timed


@dataclass
class _Asked:
    """Questions to one cache."""

    candidate: Candidate
    samples: list[Sample]
    tokens: list[Tokens]
    visible: bool
    cache: CompressedCache
    prompt_tokens: int
    entries: float
    nbytes: int
    scorer: str
    prefill_s: float | None
    compress_s: float | None

    @property
    def alone(self) -> bool:
        """Whether it must be decoded from token by token: to be timed, or because it evicts."""
        return self.compress_s is not None or not self.cache.layers[0].is_croppable


@dataclass
class _Context:
    """The work on one context."""

    model: Any
    tokenizer: Any
    group: list[Sample]
    candidates: Sequence[Candidate]
    direct: Set[Candidate]
    batch: int
    clock: _Clock

    def run(self, todo: Sequence[tuple[bool, Candidate, Sample]]) -> Iterator[list[Record]]:
        self.encoded = {sample.id: encode(sample, self.tokenizer) for sample in self.group}
        methods = [c.method for c in self.candidates if c.method is not None and c not in self.direct]
        started = _now(self.model)
        reading = Reading(self.model, self.encoded[self.group[0].id].context, methods)
        self.read_s = _now(self.model) - started
        mark = reading.mark()
        self.full: dict[str, Tensor] = {}
        for sample in {item[2].id: item[2] for item in todo}.values():
            tokens = self.encoded[sample.id]
            logits = reading.read([*tokens.question, *tokens.prefix, *tokens.answer[:-1]])
            self.full[sample.id] = logits[-len(tokens.answer) :].float().log_softmax(-1)
            reading.rewind(mark)

        waiting: list[_Asked] = []
        rows = 0
        for asked in self._compressed(reading, mark, todo):
            if asked.alone:
                one, decode_s = _step_by_step(self.model, asked.cache, asked.tokens[0])
                yield self._records(asked, [one], decode_s, [_entries(asked.cache)])
                continue
            waiting.append(asked)
            rows += len(asked.tokens)
            if rows >= self.batch:
                yield from self._flush(waiting)
                waiting, rows = [], 0
        yield from self._flush(waiting)

    def _flush(self, waiting: Sequence[_Asked]) -> Iterator[list[Record]]:
        """One forward for all that can share one: caches of the same prompt, of plain stores of as many heads."""
        shared: dict[Any, list[_Asked]] = {}
        for asked in waiting:
            shared.setdefault(_kind(asked), []).append(asked)
        for own in shared.values():
            pairs = [(asked.cache, tokens) for asked in own for tokens in asked.tokens]
            logits = _at_once(self.model, pairs)
            for asked in own:
                held = [asked.entries + tokens.fed for tokens in asked.tokens]
                yield self._records(asked, logits[: len(asked.tokens)], None, held)
                logits = logits[len(asked.tokens) :]

    def _compressed(
        self, reading: Reading, mark: Any, todo: Sequence[tuple[bool, Candidate, Sample]]
    ) -> Iterator[_Asked]:
        """Every cache that questions are put to: hidden ones first, then one a question."""
        for candidate in self.candidates:
            left = [sample for visible, other, sample in todo if not visible and other is candidate]
            evicts = candidate.method is not None and isinstance(candidate.method.stages().when, EveryStep)
            while left:
                timed = self.clock.take(candidate, left[0], False)
                size = 1 if timed or evicts else self.batch
                now, left = left[:size], left[size:]
                yield self._compress(reading, candidate, now, False, self.read_s, timed)
        for sample in self.group:
            asked = [candidate for visible, candidate, other in todo if visible and other is sample]
            if not asked:
                continue
            started = _now(self.model)
            if self.encoded[sample.id].question:
                reading.read(self.encoded[sample.id].question)
            read_s = self.read_s + _now(self.model) - started
            for candidate in asked:
                timed = self.clock.take(candidate, sample, True)
                yield self._compress(reading, candidate, [sample], True, read_s, timed)
            reading.rewind(mark)

    def _compress(
        self, reading: Reading, candidate: Candidate, samples: list[Sample], visible: bool, read_s: float, timed: bool
    ) -> _Asked:
        """The cache of what was read, with the questions on it."""
        started = _now(self.model)
        if candidate in self.direct:
            cache = compress_directly(self.model, reading.tokens, candidate.method)
        else:
            cache = reading.compress(candidate.method, fresh=timed)
        compress_s = _now(self.model) - started
        encoded = [self.encoded[sample.id] for sample in samples]
        if visible:
            encoded = [Tokens(tokens.context, [], tokens.prefix, tokens.answer) for tokens in encoded]
        stats = cache.stats()
        return _Asked(
            candidate=candidate,
            samples=samples,
            tokens=encoded,
            visible=visible,
            cache=cache,
            prompt_tokens=len(reading.tokens),
            entries=_entries(cache),
            nbytes=stats.nbytes,
            scorer=stats.layers[0].scorer,
            prefill_s=read_s if timed else None,
            compress_s=compress_s if timed else None,
        )

    def _records(
        self, asked: _Asked, logits: Sequence[Tensor], decode_s: float | None, held: Sequence[float]
    ) -> list[Record]:
        records = []
        for sample, tokens, own, end_entries in zip(asked.samples, asked.tokens, logits, held):
            truth = torch.tensor(tokens.answer, device=own.device)
            full, logp = self.full[sample.id], own.float().log_softmax(-1)
            right = int((logp.argmax(-1) == truth).sum())
            records.append(
                Record(
                    method=asked.candidate.name,
                    parameters=str(asked.candidate),
                    budget=asked.candidate.budget,
                    id=sample.id,
                    context_id=sample.context_id,
                    task=sample.task,
                    length=sample.length,
                    depth=sample.depth,
                    question_visible=asked.visible,
                    right=right == len(tokens.answer),
                    tokens_right=right,
                    tokens=len(tokens.answer),
                    agreement=(logp.argmax(-1) == full.argmax(-1)).float().mean().item(),
                    kl=max(0.0, F.kl_div(logp, full, reduction="batchmean", log_target=True).item()),
                    nll=F.nll_loss(logp, truth).item(),
                    prompt_tokens=asked.prompt_tokens,
                    entries=asked.entries,
                    end_entries=end_entries,
                    bytes=asked.nbytes,
                    prefill_s=asked.prefill_s,
                    compress_s=asked.compress_s,
                    decode_s=None if asked.compress_s is None else decode_s,
                    scorer=asked.scorer,
                )
            )
        return records


def _entries(cache: CompressedCache) -> float:
    """What a cache holds, the mean over layers, heads and rows."""
    layers = [sum(layer.entries) / len(layer.entries) for layer in cache.stats().layers]
    return sum(layers) / len(layers)


def _kind(asked: _Asked) -> Any:
    """What caches must have in common to be put into one batch; one that is not plain goes alone."""
    shapes = []
    for layer in asked.cache.layers:
        store = getattr(layer, "store", None)
        if type(store) is not DenseStore or store.extra:
            return asked.cache
        shapes.append(store.keys.shape[1])
    return asked.prompt_tokens, tuple(shapes)


def _at_once(model: Any, pairs: Sequence[tuple[CompressedCache, Tokens]]) -> list[Tensor]:
    """Logits of each answer's tokens ``[n, vocabulary]``, a row for each cache and question, in one forward."""
    rows = [[*tokens.question, *tokens.prefix, *tokens.answer[:-1]] for _, tokens in pairs]
    longest, seen, device = max(map(len, rows)), pairs[0][0].get_seq_length(), model.device
    cache = _stacked(model.config, [cache for cache, _ in pairs], longest)
    padding = [longest - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows)], device=device)
    order = torch.arange(longest, device=device) - torch.tensor(padding, device=device)[:, None]
    options: dict[str, Any] = {"position_ids": seen + order.clamp(min=0)}
    if any(padding):
        options["attention_mask"] = torch.cat([order.new_ones(len(rows), seen), (order >= 0).to(order.dtype)], 1)
    keep = max(len(tokens.answer) for _, tokens in pairs)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep, **options).logits
    return [own[-len(tokens.answer) :] for own, (_, tokens) in zip(logits, pairs)]


def _stacked(config: Any, caches: Sequence[CompressedCache], room: int) -> CompressedCache:
    """Caches of the same prompt as the rows of one, with room for new tokens; nothing is evicted from it.

    The same cache several times, of whatever store, becomes as many rows and is not fit for anything else then.
    """
    if all(cache is caches[0] for cache in caches):
        if len(caches) > 1:
            caches[0].batch_repeat_interleave(len(caches))
        return caches[0]
    out = CompressedCache(config)
    for index, layer in enumerate(out.layers):
        assert isinstance(layer, CompressedLayer)
        own = [part for cache in caches if isinstance(part := cache.layers[index], CompressedLayer)]
        stores = [part.store for part in own if part.store is not None]
        longest = max(store.max_length for store in stores) + room
        held = {}
        for name in ("keys", "values", "positions"):
            first = stores[0].tensors[name]
            held[name] = first.new_zeros((len(stores), first.shape[1], longest, *first.shape[3:]))
            for row, store in enumerate(stores):
                held[name][row, :, : store.max_length] = store.tensors[name][0, :, : store.max_length]
        lengths, seen = ([n for store in stores for n in getattr(store, name)] for name in ("lengths", "seen"))
        layer.store = DenseStore(held["keys"], held["values"], held["positions"], lengths, seen=seen)
        layer.columns, layer.prompt_over = own[0].columns, True
    return out


def _step_by_step(model: Any, cache: CompressedCache, tokens: Tokens) -> tuple[Tensor, float | None]:
    """The same for one question, token by token, and the seconds that each token took."""

    def step(ids: list[int]) -> Tensor:
        given = torch.tensor([ids], device=model.device)
        return model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0]

    logits = [step([*tokens.question, *tokens.prefix])]
    started = _now(model)
    logits += [step([token]) for token in tokens.answer[:-1]]
    spent = _now(model) - started
    return torch.cat(logits), spent / (len(logits) - 1) if len(logits) > 1 else None


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
