"""Runs questions against compressed caches and writes down what came of each."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kvcompress.evaluate.reading import Prompts, feed, read, replayable
from kvcompress.evaluate.tasks import Sample, Tokens, encode
from kvcompress.methods import Method
from kvcompress.models import CompressedCache, attach
from kvcompress.models.layer import CompressedLayer

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
        bytes: of the cache after the cut, without room for new tokens: K, V, positions, and what the method keeps beside them.
        prefill_s, compress_s, decode_s: seconds to read the prompt, to compress it, and for each decoded token; None where
            not measured. Of a model with other layers besides, every method reads the prompt anew and compresses it meanwhile:
            all of that is prefill_s.
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
    batch: int | None = None,
    timed: int = 2,
    done: Set[tuple[Any, ...]] = frozenset(),
    on_step: Callable[[int], None] = lambda _: None,
) -> Iterator[Record]:
    """Asks every question of every candidate.

    Visible: context and question are compressed, then ``answer_prefix`` and the answer follow. Hidden: the context alone is
    compressed, and all its questions are asked on copies of the same cache. Positions go on from the uncompressed
    length. The prompt attends in full, so it is read once and compressed by every candidate; prompts of the same length
    are rows of one batch, from reading to the answer.

    The answer is fed to the model in one pass, all of whose first choices must be right: for methods that cut once that is
    the same as greedy decoding. Methods that evict while decoding are fed token by token.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        samples: questions; those of one context are worked on together.
        candidates: methods with budgets.
        question_visible: which of the two modes.
        batch: most questions that are worked on together; None: what suits the device. It changes no result but by rounding.
        timed: samples of a candidate, length and mode that are timed: alone, scored afresh and decoded token by token.
        done: keys of records that are there already.
        on_step: is called with the number of measurements that were made or skipped.

    Yields:
        One `Record` a sample, candidate and mode; timed ones first.
    """
    contexts = _contexts(samples, tokenizer)
    todo = [
        (visible, number, question.sample.id)
        for context in contexts
        for question in context.questions
        for visible in question_visible
        for number, candidate in enumerate(candidates)
        if _key(candidate, question.sample, visible) not in done
    ]
    on_step(len(samples) * len(candidates) * len(question_visible) - len(todo))
    run = _Run(model, candidates, set(todo), batch)
    with attach(model), torch.inference_mode():
        for records in itertools.chain(run.alone(contexts, timed), run.together(contexts)):
            yield from records
            on_step(len(records))


def _key(candidate: Candidate, sample: Sample, visible: bool) -> tuple[Any, ...]:
    return (str(candidate), candidate.budget, sample.id, visible)


@dataclass(frozen=True)
class _Question:
    sample: Sample
    tokens: Tokens

    def before(self, visible: bool) -> list[int]:
        """What stands between the compressed prompt and the answer."""
        return self.tokens.prefix if visible else [*self.tokens.question, *self.tokens.prefix]

    def fed(self, visible: bool) -> int:
        """How many tokens go in behind the compressed prompt before the answer's last one is predicted."""
        return len(self.before(visible)) + len(self.tokens.answer) - 1


@dataclass(frozen=True)
class _Context:
    ids: list[int]
    questions: list[_Question]


def _contexts(samples: Iterable[Sample], tokenizer: Any) -> list[_Context]:
    """Contexts with their questions, in order of first appearance."""
    contexts: dict[tuple[Any, ...], _Context] = {}
    for sample in samples:
        tokens = encode(sample, tokenizer)
        key = (sample.context_id, sample.length, tuple(tokens.context))
        contexts.setdefault(key, _Context(tokens.context, [])).questions.append(_Question(sample, tokens))
    return list(contexts.values())


@dataclass
class _Run:
    """The measurements that are to be made, and the making of them.

    Attributes:
        todo: mode, number of the candidate and id of the sample of each one left.
        batch: most questions in one forward; None: see `_suitable`.
    """

    model: Any
    candidates: Sequence[Candidate]
    todo: set[tuple[bool, int, str]]
    batch: int | None

    def __post_init__(self) -> None:
        self._methods = [c.method for c in self.candidates if c.method is not None]
        self._modes = sorted({visible for visible, _, _ in self.todo})
        self._in_batches = replayable(self.model.config)

    # --- which questions together

    def alone(self, contexts: Sequence[_Context], timed: int) -> Iterator[list[Record]]:
        """The first `timed` measurements of each candidate, length and mode, one by one and with their times."""
        taken: dict[Any, int] = {}
        for context, question, visible in ((c, q, v) for c in contexts for q in c.questions for v in self._modes):
            own = []
            for number in range(len(self.candidates)):
                kind = (number, question.sample.length, visible)
                if taken.get(kind, 0) < timed and (visible, number, question.sample.id) in self.todo:
                    taken[kind] = taken.get(kind, 0) + 1
                    own.append(number)
            if own:
                prompt = [*context.ids, *(question.tokens.question if visible else [])]
                started = _now(self.model)
                prompts = read(self.model, [prompt], self._methods)
                yield from self._ask(prompts, [(0, question)], visible, own, _now(self.model) - started)

    def together(self, contexts: Sequence[_Context]) -> Iterator[list[Record]]:
        """All others, in batches of contexts with all their questions."""
        left = {sample for _, _, sample in self.todo}
        batch: list[_Context] = []
        for context in contexts:
            own = _Context(context.ids, [q for q in context.questions if q.sample.id in left])
            if own.questions and batch and not self._fit([*batch, own]):
                yield from self._read(batch)
                batch = []
            if own.questions:
                batch.append(own)
        if batch:
            yield from self._read(batch)

    def _fit(self, contexts: Sequence[_Context]) -> bool:
        """Whether these contexts are read together: of one length, and with not too many questions."""
        lengths = {context.questions[0].sample.length for context in contexts}
        most = self._most(max(len(context.ids) for context in contexts))
        return len(lengths) == 1 and self._in_batches and sum(len(c.questions) for c in contexts) <= most

    def _most(self, tokens: int) -> int:
        """Most questions in one forward. Where layers slide over their prompt, padding would count as a part of it."""
        return (self.batch or _suitable(self.model, tokens)) if self._in_batches else 1

    def _read(self, contexts: Sequence[_Context]) -> Iterator[list[Record]]:
        """All that is left to ask about these contexts."""
        prompts = read(self.model, [context.ids for context in contexts], self._methods)
        questions = [(row, question) for row, context in enumerate(contexts) for question in context.questions]
        numbers, most = range(len(self.candidates)), self._most(max(prompts.lengths))
        for part in (questions[first : first + most] for first in range(0, len(questions), most)):
            if False in self._modes:
                yield from self._ask(prompts, part, False, numbers)
            if True in self._modes:
                rows = [row for row, _ in part]
                whole = prompts.extended([question.tokens.question for _, question in part], rows)
                yield from self._ask(whole, [(i, question) for i, (_, question) in enumerate(part)], True, numbers)

    # --- asking

    def _ask(
        self,
        prompts: Prompts,
        asked: Sequence[tuple[int, _Question]],
        visible: bool,
        numbers: Iterable[int],
        prefill_s: float | None = None,
    ) -> Iterator[list[Record]]:
        """Questions, each on a row of the prompts, to one candidate after the other; timed where `prefill_s` is."""
        full: Tensor | None = None
        for number in numbers:
            mine = [i for i, (_, q) in enumerate(asked) if (visible, number, q.sample.id) in self.todo]
            if not mine:
                continue
            if full is None:
                rows, questions = [row for row, _ in asked], [question for _, question in asked]
                room = max(question.fed(visible) for question in questions)
                cache = _picked(prompts.compress(None, reserve=room), rows)
                full = _at_once(self.model, cache, questions, visible).float().log_softmax(-1)
            part = [asked[i] for i in mine]
            yield self._measure(prompts, part, visible, self.candidates[number], full[mine], prefill_s)
            self.todo -= {(visible, number, question.sample.id) for _, question in part}

    def _measure(
        self,
        prompts: Prompts,
        asked: Sequence[tuple[int, _Question]],
        visible: bool,
        candidate: Candidate,
        full: Tensor,
        prefill_s: float | None,
    ) -> list[Record]:
        """Questions to one candidate. `full` is what the full cache says of each answer, see `_at_once`."""
        room, timed = max(question.fed(visible) for _, question in asked), prefill_s is not None
        started = _now(self.model)
        cache = prompts.compress(candidate.method, reserve=room, fresh=timed)
        compress_s = _now(self.model) - started if timed else None
        if timed and not self._in_batches:
            prefill_s, compress_s = compress_s, None
        rows, questions = [row for row, _ in asked], [question for _, question in asked]
        scorers = {row: cache.scorer(row) for row in set(rows)}
        sizes = {row: (*size, scorers[row]) for row, size in _sizes(cache, sorted(scorers)).items()}
        cache, decode_s = _picked(cache, rows), None
        if timed or _evicts(cache):
            logits, held, decode_s = _step_by_step(self.model, cache, questions, visible)
        else:
            logits = _at_once(self.model, cache, questions, visible)
            held = [sizes[row][0] + question.fed(visible) for row, question in asked]
        records = []
        for (row, question), figures, end_entries in zip(asked, _figures(logits, full, questions), held):
            sample, (entries, nbytes, scorer) = question.sample, sizes[row]
            records.append(
                Record(
                    method=candidate.name,
                    parameters=str(candidate),
                    budget=candidate.budget,
                    id=sample.id,
                    context_id=sample.context_id,
                    task=sample.task,
                    length=sample.length,
                    depth=sample.depth,
                    question_visible=visible,
                    **figures,
                    prompt_tokens=prompts.lengths[row],
                    entries=entries,
                    end_entries=end_entries,
                    bytes=nbytes,
                    prefill_s=prefill_s,
                    compress_s=compress_s,
                    decode_s=decode_s if timed else None,
                    scorer=scorer,
                )
            )
        return records


def _suitable(model: Any, tokens: int) -> int:
    """How many prompts of so many tokens are worked on together.

    On a GPU a batch costs hardly more than a row as long as the model is small, because the host is what limits; rows are as many as
    leave room for copies of their caches, queries and residual streams, and for what a forward holds. On a CPU every row costs its
    own arithmetic, and few rows stay in its caches.
    """
    if model.device.type != "cuda":
        return _CPU_ROWS
    config = model.config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    held = _COPIES * 2 * heads * dim + 2 * (config.num_attention_heads * dim + 2 * config.hidden_size)
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    a_row = tokens * model.dtype.itemsize * (config.num_hidden_layers * held + 4 * wide)
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(_GPU_ROWS, free // a_row))


_CPU_ROWS, _GPU_ROWS = 4, 128
_COPIES = 8  # of each row's whole cache: read, aligned, with its question, in a cut that is still to come, and room


def _picked(cache: CompressedCache, rows: Sequence[int]) -> CompressedCache:
    """The cache whose row i is the old row ``rows[i]``."""
    cache.batch_select_indices(torch.tensor(rows))
    return cache


def _layers(cache: CompressedCache) -> list[CompressedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


def _stores(cache: CompressedCache) -> list[Any]:
    return [layer.store for layer in _layers(cache)]


def _evicts(cache: CompressedCache) -> bool:
    """Whether entries leave while decoding."""
    return not all(layer.is_croppable for layer in _layers(cache))


def _sizes(cache: CompressedCache, rows: Iterable[int]) -> dict[int, tuple[float, int]]:
    """Entries of these rows, the mean over layers and heads, and their bytes without room and counters.

    Layers that are not compressed count with all their bytes: their caches have one row only.
    """
    nbytes = 0
    if len(_layers(cache)) < len(cache.layers):
        stats = cache.stats()
        nbytes = stats.nbytes - sum(layer.nbytes for layer in stats.layers)
    held = [
        (store.head_lengths, store.entry_nbytes, sum(t[:1].nbytes for t in store.extra.values()))
        for store in _stores(cache)
    ]
    return {
        row: (
            sum(sum(heads[row]) / len(heads[row]) for heads, _, _ in held) / len(held),
            nbytes + sum(sum(heads[row]) * entry + extra for heads, entry, extra in held),
        )
        for row in rows
    }


def _at_once(model: Any, cache: CompressedCache, questions: Sequence[_Question], visible: bool) -> Tensor:
    """Logits that predict each answer, in one forward: ``[batch, longest answer, vocabulary]``, each row's in its last columns."""
    rows = [[*question.before(visible), *question.tokens.answer[:-1]] for question in questions]
    keep = max(len(question.tokens.answer) for question in questions)
    return feed(model, cache, rows, _seen(cache), keep)


def _step_by_step(
    model: Any, cache: CompressedCache, questions: Sequence[_Question], visible: bool
) -> tuple[Tensor, list[float], float | None]:
    """The same token by token, what each row held when its last one was predicted, and the seconds that a token took."""
    answers = [question.tokens.answer for question in questions]
    longest = max(map(len, answers))
    logits = [feed(model, cache, [question.before(visible) for question in questions], _seen(cache))]
    held = [0.0] * len(answers)
    started = _now(model)
    for step in range(longest):
        ends = [row for row, answer in enumerate(answers) if len(answer) == step + 1]
        spent = _now(model) - started if ends else 0.0
        for row, (entries, _) in _sizes(cache, ends).items() if ends else ():
            held[row] = entries
        if step + 1 < longest:  # a row that has ended goes on with any token: rows do not see each other
            given = [answer[min(step, len(answer) - 1) :][:1] for answer in answers]
            logits.append(feed(model, cache, given, _seen(cache)))
    all_steps = torch.cat(logits, 1)
    rolled = [row.roll(longest - len(answer), 0) for row, answer in zip(all_steps, answers)]
    return torch.stack(rolled), held, spent / (longest - 1) if longest > 1 else None


def _seen(cache: CompressedCache) -> list[int]:
    return list(_stores(cache)[0].seen)


_LOGITS = 1 << 24  # that are widened at a time


def _figures(logits: Tensor, full: Tensor, questions: Sequence[_Question]) -> list[dict[str, Any]]:
    """The figures of a `Record` that compare logits with the answer and with the full cache's log-probabilities.

    Both ``[batch, n, vocabulary]``, each answer in a row's last columns; `full` may have more columns in front.
    """
    counts = [len(question.tokens.answer) for question in questions]
    longest = max(counts)
    logits, full = logits[:, -longest:], full[:, -longest:]
    ids = [[0] * (longest - len(q.tokens.answer)) + list(q.tokens.answer) for q in questions]
    truth = torch.tensor(ids, device=logits.device)
    place = torch.arange(longest, device=logits.device)
    real = place >= longest - torch.tensor(counts, device=logits.device)[:, None]
    sums: list[list[float]] = []
    rows = max(1, _LOGITS // max(1, logits[0].numel()))
    for own, whole, answer, counted in zip(*(t.split(rows) for t in (logits, full, truth, real))):
        logp = own.float().log_softmax(-1)
        best = logp.argmax(-1)
        parts = [
            best == answer,
            best == whole.argmax(-1),
            (whole.exp() * (whole - logp)).sum(-1),
            -logp.gather(-1, answer[..., None])[..., 0],
        ]
        sums += torch.stack([torch.where(counted, part, 0).double().sum(1) for part in parts], 1).tolist()
    return [
        {
            "right": right == count,
            "tokens_right": int(right),
            "tokens": count,
            "agreement": agree / count,
            "kl": max(0.0, kl / count),
            "nll": nll / count,
        }
        for (right, agree, kl, nll), count in zip(sums, counts)
    ]


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
