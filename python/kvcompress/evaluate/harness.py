"""Tasks of lm-evaluation-harness (RULER, LongBench, ...) on a compressed cache; needs the extra `eval`.

    rows = run_tasks(model, tokenizer, methods.create("snapkv", budget=0.1), ["ruler_niah_single"], limit=50)

The harness hands over one text that ends with the question, so every figure is of the query-aware kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from kvcompress.evaluate.reading import compress_directly
from kvcompress.methods import Method
from kvcompress.models import CompressedCache, attach, cache_argument

__all__ = ["CompressedLM", "run_tasks"]


class CompressedLM(TemplateLM):
    """A causal LM of transformers whose prompts are compressed, as lm-eval asks its models.

    Of every request the whole prompt but its last token is compressed, and the rest is fed on top. `kept` collects, for each
    prompt, its tokens, the entries that stayed (mean over layers and heads) and the bytes.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        method: None keeps every entry.
        max_new_tokens: for tasks that name no limit.
    """

    def __init__(self, model: Any, tokenizer: Any, method: Method | None, *, max_new_tokens: int = 128) -> None:
        super().__init__()
        self.model, self.tokenizer, self.method = model, tokenizer, method
        self.max_new_tokens = max_new_tokens
        self.kept: list[tuple[int, float, int]] = []
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """End of text; what stands in for an empty context."""
        tokenizer = self.tokenizer
        token = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        return 0 if token is None else token

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text starts with <bos> where the tokenizer has one, unless `add_special_tokens` is False."""
        ids = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        return ids if bos is None or add_special_tokens is False or ids[:1] == [bos] else [bos, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        with attach(self.model), torch.inference_mode():
            for context, group in groupby(order, key=lambda i: requests[i][1]):  # answers to choose from share a cache
                cache = None
                for i in group:
                    given = [context[-1], *requests[i][2][:-1]]
                    if cache is None:
                        cache = self._compress(context[:-1])
                    logits = self._feed(given, cache)
                    truth = torch.tensor(requests[i][2], device=logits.device)
                    logp = logits.float().log_softmax(-1)
                    score = logp.gather(-1, truth[:, None]).sum().item()
                    found[i] = (score, bool((logp.argmax(-1) == truth).all()))
                    if cache is not None and cache.is_croppable:
                        cache.crop(-len(given))
                    else:
                        cache = None
        return [found[i] for i in range(len(requests))]

    def _feed(self, ids: list[int], cache: CompressedCache | None) -> torch.Tensor:
        """Logits of each token; one by one where the cache evicts, so that a token sees what decoding would have kept."""
        parts = [ids] if cache is None or cache.is_croppable else [[token] for token in ids]
        logits = []
        for part in parts:
            given = torch.tensor([part], device=self.model.device)
            logits.append(self._forward(given, cache).logits[0])
        return torch.cat(logits)

    def _forward(self, ids: torch.Tensor, cache: CompressedCache | None, **options: Any) -> Any:
        return self.model(ids, use_cache=cache is not None, **{cache_argument(self.model): cache}, **options)

    def _compress(self, ids: list[int]) -> CompressedCache | None:
        """The compressed prompt; None where there is nothing to compress."""
        if not ids:
            return None
        cache = compress_directly(self.model, ids, self.method)
        stats = cache.stats()
        entries = fmean(fmean(layer.entries) for layer in stats.layers)
        self.kept.append((len(ids), entries, stats.nbytes))
        return cache

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Every token is a prompt's and an answer's at once, so there is nothing to compress first."""
        raise NotImplementedError(
            "CompressedLM: perplexity of a whole text has no prompt to compress; use `kvcompress eval --tasks text:FILE`"
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy decoding until a stop string, end of text or the task's limit.

        Raises:
            ValueError: a task that asks for sampling.
        """
        texts = []
        with attach(self.model), torch.inference_mode():
            for prompt, options in (request.args for request in requests):
                if options.get("do_sample") or options.get("temperature") or options.get("num_beams", 1) != 1:
                    raise ValueError(f"generate_until: generation must be greedy, got {options}")
                texts.append(self._generate(self.tok_encode(prompt), options))
        return texts

    def _generate(self, ids: list[int], options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.max_new_tokens)
        cache = self._compress(ids[:-1]) or CompressedCache(self.model.config, self.method)
        given: list[int] = []
        last, text = ids[-1], ""
        while len(given) < limit:
            step = torch.tensor([[last]], device=self.model.device)
            last = int(self._forward(step, cache, logits_to_keep=1).logits[0, -1].argmax())
            if last == self.tokenizer.eos_token_id:
                break
            given.append(last)
            text = self.tokenizer.decode(given, skip_special_tokens=True)
            ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return text


def run_tasks(
    model: Any,
    tokenizer: Any,
    method: Method | None,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    folder: str | None = None,
    lengths: Sequence[int] = (),
    seed: int = 1234,
) -> list[dict[str, Any]]:
    """Runs tasks of lm-eval; one row a task and metric.

    Args:
        model, tokenizer, method: see `CompressedLM`.
        tasks: names of lm-eval's tasks or groups.
        limit: questions a task.
        folder: own tasks as YAML files, besides those of lm-eval.
        lengths: handed to tasks that make their own prompts, such as RULER.
        seed: of the few-shot examples.

    Returns:
        Dicts with task, metric, value, stderr, n, entries, kept, bytes; the last three are means over all prompts.
    """
    asked = CompressedLM(model, tokenizer, method)
    metadata: dict[str, Any] = {"pretrained": tokenizer.name_or_path}
    if lengths:
        metadata["max_seq_lengths"] = list(lengths)
    found = simple_evaluate(
        asked, tasks=list(tasks), limit=limit, log_samples=False, bootstrap_iters=1000, fewshot_random_seed=seed,
        task_manager=TaskManager(include_path=folder, metadata=metadata), metadata=metadata,
    )  # fmt: skip
    if found is None:
        return []
    sizes = {
        "prompts": len(asked.kept),
        "entries": fmean(entries for _, entries, _ in asked.kept) if asked.kept else 0.0,
        "kept": fmean(entries / tokens for tokens, entries, _ in asked.kept) if asked.kept else 1.0,
        "bytes": round(fmean(size for *_, size in asked.kept)) if asked.kept else 0,
    }
    rows = []
    for task, values in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        for key, value in values.items():
            metric, _, version = key.partition(",")
            if not version or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{version}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if version == "none" else key,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                    "n": counts.get("effective"),
                    **sizes,
                }
            )
    return rows
