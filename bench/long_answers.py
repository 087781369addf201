"""Long answers under evictions: of a text at the front of a prompt, hundreds of tokens are to be given again.

The answer is fed to the model token by token through a `FixedCache` (a captured CUDA graph on a GPU), each method at each budget
evicting as it goes; a token is right where it is the model's first choice. Samples of `kvcompress.evaluate.generators`, in
batches; intervals are bootstrapped over samples, 95 %.

    python -m bench.long_answers --device cuda --out bench/results/long_answers_kvc_mini.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.harness import captured
from kvcompress.evaluate.generators import generate
from kvcompress.evaluate.metrics import bootstrap
from kvcompress.evaluate.tasks import Tokens, encode
from kvcompress.methods import create
from kvcompress.models import FixedCache, attach

ROOT = Path(__file__).parent.parent
TASKS = ("words_again", "pairs_again", "text_again")
METHODS: dict[str, dict] = {
    "morphkv": {},
    "tova": {"decode": True},
    "h2o": {"decode": True},
    "streaming_llm": {},
}
PARTS = 4  # of an answer, whose tokens are also counted apart


class Forced:
    """A model that is fed answers over one cache; on a GPU one captured step serves all prompts."""

    def __init__(self, model, cache: FixedCache, batch: int) -> None:
        self.model, self.cache, self.graph = model, cache, None
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self.position = torch.zeros_like(self.token)

    def launch(self) -> None:
        out = self.model(input_ids=self.token, position_ids=self.position, past_key_values=self.cache)
        self.choice = out.logits[:, -1].argmax(-1)
        self.position.add_(1)

    def choices(self, samples: list[Tokens]) -> list[list[int]]:
        """What the model would have said in place of each token of the answers."""
        device = self.model.device
        prompts = [[*s.context, *s.question] for s in samples]
        longest, steps = max(map(len, prompts)), max(len(s.answer) for s in samples)
        ids, mask = (torch.zeros(len(samples), longest, dtype=torch.int64) for _ in range(2))
        fed = torch.zeros(len(samples), steps, dtype=torch.int64)
        for row, (prompt, sample) in enumerate(zip(prompts, samples)):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
            given = [*sample.prefix, *sample.answer[:-1]]
            assert len(sample.prefix) == 1
            fed[row, : len(given)] = torch.tensor(given)
        ids, mask, fed = ids.to(device), mask.to(device), fed.to(device)
        start = mask.sum(-1, keepdim=True)

        def read() -> None:
            self.cache.reset()
            position = (mask.cumsum(-1) - 1).clamp(min=0)
            options = {"attention_mask": mask, "position_ids": position, "past_key_values": self.cache}
            self.model(input_ids=ids, logits_to_keep=1, **options)
            self.position.copy_(start)

        read()
        if device.type == "cuda" and self.graph is None:
            self.graph = captured(self.launch)  # its warm-up has spoiled the cache
            read()
        said = []
        for step in range(steps):
            self.token.copy_(fed[:, step : step + 1])
            self.launch() if self.graph is None else self.graph.replay()
            said.append(self.choice.clone())
        return torch.stack(said, 1).tolist()


def line(
    task: str, method: str, budget: int | None, entries: int, samples: list[Tokens], said: list[list[int]]
) -> dict:
    right = [[a == b for a, b in zip(s.answer, row)] for s, row in zip(samples, said)]
    low, high = bootstrap([[[fmean(row)] for row in right]])
    quarters = [
        fmean(fmean(row[part * len(row) // PARTS : (part + 1) * len(row) // PARTS]) for row in right)
        for part in range(PARTS)
    ]
    return {
        "task": task,
        "method": method,
        "budget": budget,
        "entries": entries,
        "right": fmean(map(fmean, right)),
        "low": low,
        "high": high,
        "by_quarter": quarters,
        "n": len(samples),
        "prompt_tokens": fmean(len(s.context) + len(s.question) for s in samples),
        "answer_tokens": fmean(len(s.answer) for s in samples),
    }


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict:
    started = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tasks = {
        task: [
            encode(s, tokenizer)
            for s in generate(task, tokenizer, length=args.length, count=args.count, seed=args.seed)
        ]
        for task in args.tasks
    }
    longest = max(len(s.answer) for samples in tasks.values() for s in samples)
    kinds = [("full", None, None)]
    kinds += [
        (name, budget, create(name, budget=budget, **METHODS[name])) for name in args.methods for budget in args.budgets
    ]
    lines = []
    with attach(model):
        for name, budget, method in kinds:
            capacity = args.length + longest + 8 if method is None else None
            forced = Forced(model, FixedCache(model.config, method, room=longest + 8, capacity=capacity), args.batch)
            for task, samples in tasks.items():
                said = []
                for first in range(0, len(samples), args.batch):
                    said += forced.choices(samples[first : first + args.batch])
                entries = max(max(layer.entries) for layer in forced.cache.stats().layers)
                lines.append(line(task, name, budget, entries, samples, said))
                print(f"{task:12s} {name:14s} {budget or 'all':>4} {lines[-1]['right']:.3f}", flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    return {
        "model": "models/kvc-mini",
        "device": device,
        "torch": torch.__version__,
        "dtype": "float32",
        "length": args.length,
        "seed": args.seed,
        "methods": {name: str(create(name, budget=args.budgets[0], **METHODS[name])) for name in args.methods},
        "seconds": round(time.perf_counter() - started, 1),
        "lines": lines,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "kvc-mini"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--length", type=int, default=2048, help="tokens of prompt and answer together")
    parser.add_argument("--count", type=int, default=48, help="samples a task, a multiple of --batch")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.count % args.batch:
        parser.error(f"--count must be a multiple of --batch ({args.batch}), got {args.count}")
    result = measure(args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
