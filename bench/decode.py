"""Decoding under a CUDA graph: what evictions cost a token, and endless streams in flat memory.

Steps: a model of Llama 3.1 8B's shape with random weights (--layers says how much of it), one captured step for each cache,
replayed in turns. Beside ours: transformers' StaticCache with SDPA over 32k and over 1024 slots, and our fixed store of 1024 entries that
evicts nothing.

Eager: the same steps launched one by one, as a plain Python loop does, beside what `bench.peer_decode` measured (--add).

Streams: --tokens tokens of a small model through one captured step: allocator figures before and after, and the first
against the last thousand tokens.

    python -m bench.decode steps --layers 32 --out decode.json
    python -m bench.decode eager --add peer.json --out decode_eager.json
    python -m bench.decode streams --tokens 20000 --budget 512 --out streams.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from bench.harness import captured
from bench.shapes import LLAMA_8B, SMALL
from kvcompress.methods import create
from kvcompress.models import CompressedCache, FixedCache, attach

REPLAYS, ROUNDS = 16, 5


def build(shape, layers, device, dtype):
    config = LlamaConfig(**shape, num_hidden_layers=layers, eos_token_id=None, attn_implementation="sdpa")
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


class Step:
    """One decode step of a model over a cache that holds a prompt: launched, or replayed as a CUDA graph."""

    def __init__(self, model, cache, prompt_len, *, count=True):
        self.model, self.cache = model, cache
        ids = torch.randint(0, model.config.vocab_size, (1, prompt_len), device=model.device)
        self.token = ids[:, :1].clone()
        self.position = torch.full_like(self.token, prompt_len)
        model(ids, past_key_values=cache, logits_to_keep=1)
        self.launch()  # lazy initialisations
        self.kernels = self._count() if count and model.device.type == "cuda" else None
        self.graph = None

    def launch(self):
        out = self.model(input_ids=self.token, position_ids=self.position, past_key_values=self.cache)
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def _count(self):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.launch()
            torch.cuda.synchronize()
        return sum(
            event.device_type == torch.autograd.DeviceType.CUDA
            and "Memcpy" not in event.name
            and "Memset" not in event.name
            for event in profile.events()
        )

    def capture(self):
        self.graph = captured(self.launch)
        return self

    def run(self):
        self.launch() if self.graph is None else self.graph.replay()


def machine(device):
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
    }


@torch.inference_mode()
def steps(args):
    """ms a token of every cache, replayed in turns."""
    model = build(LLAMA_8B, args.layers, "cuda", torch.bfloat16)
    budget, full, prompt = args.budget, args.full, args.budget + 512
    variants = {}
    held = (
        budget - ROUNDS * (REPLAYS + 1) // 2
    )  # so that the dense store holds `budget` entries in the middle of the run
    for name, make, length in (
        ("StaticCache SDPA, full", partial(StaticCache, max_cache_len=full + 256), full),
        ("StaticCache SDPA, dense", partial(StaticCache, max_cache_len=budget), budget // 2),
    ):
        if args.no_full and length == full:
            continue
        variants[name] = Step(model, make(config=model.config), length).capture()
    ours = {
        "FixedCache, full": (None, full),
        "FixedCache, dense, no eviction": (create("snapkv", budget=held), prompt),
        "sliding_window": (create("sliding_window", budget=budget), prompt),
        "streaming_llm": (create("streaming_llm", budget=budget), prompt),
        "morphkv": (create("morphkv", budget=budget), prompt),
        "h2o": (create("h2o", budget=budget, decode=True), prompt),
        "tova": (create("tova", budget=budget, decode=True), prompt),
        "adakv, then morphkv": (create("prefill_decode", budget=budget, prefill="adakv", decode="morphkv"), prompt),
    }
    with attach(model):
        for name, (method, length) in ours.items():
            if args.no_full and length == full:
                continue
            cache = FixedCache(model.config, method, room=ROUNDS * (REPLAYS + 1) + 16)
            variants[name] = Step(model, cache, length).capture()
    times = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, step in variants.items():
            step.run()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPLAYS):
                step.run()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / REPLAYS)
    base = statistics.median(times["FixedCache, dense, no eviction"])
    rows = []
    for name, measured in times.items():
        median = statistics.median(measured)
        rows.append(
            {
                "cache": name,
                "ms": median,
                "spread": [min(measured), max(measured)],
                "ratio_to_dense": median / base,
                "kernels": variants[name].kernels,
            }
        )
        print(
            f"{name:32s} {median:7.3f} ms a token ({min(measured):.3f} to {max(measured):.3f}), {median / base:.3f} of dense, "
            f"{variants[name].kernels} kernels"
        )
    return {"layers": args.layers, "budget": budget, "full": full, "rows": rows}


@torch.inference_mode()
def eager(args):
    """ms a token of steps that are launched, cache after cache; and the peer's, measured in its own environment."""
    cuda = args.device == "cuda"
    model = build(
        SMALL if args.small else LLAMA_8B, args.layers, args.device, torch.bfloat16 if cuda else torch.float32
    )
    budget, rows = args.budget, []
    fixed = {
        "FixedCache, nothing evicted": create("snapkv", budget=budget),
        "FixedCache, morphkv": create("morphkv", budget=budget),
        "FixedCache, h2o": create("h2o", budget=budget, decode=True),
        "FixedCache, tova": create("tova", budget=budget, decode=True),
        "FixedCache, streaming_llm": create("streaming_llm", budget=budget),
    }
    caches = {name: partial(FixedCache, method=method, room=args.steps + 16) for name, method in fixed.items()}
    for every in args.every:
        method = create("knorm", budget=budget, decode=True, every=every, skip_layers=())
        caches[f"CompressedCache, knorm, every {every}"] = partial(CompressedCache, method=method)
    for name, make in caches.items():
        steps = max(args.steps, int(name.rpartition("every ")[2])) if "every" in name else args.steps
        with attach(model):
            step = Step(model, make(model.config), budget + 64, count=False)
            taken = []
            for _ in range(8 + steps):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                step.run()
                if cuda:
                    torch.cuda.synchronize()
                taken.append((time.perf_counter() - start) * 1e3)
        taken = taken[8:]
        rows.append(
            {
                "cache": name,
                "ms": statistics.fmean(taken),
                "median_ms": statistics.median(taken),
                "entries": max(max(layer.entries) for layer in step.cache.stats().layers),
                "transformers": transformers.__version__,
                "launched": True,
            }
        )
        print(f"{name:44s} {rows[-1]['ms']:8.3f} ms a token, {rows[-1]['entries']} entries", flush=True)
    peer = json.loads(args.add.read_text()) if args.add else {"absent": {"kvpress DecodingPress": "not measured"}}
    return {"layers": args.layers, "budget": budget, "rows": rows + peer.pop("rows", []), **peer}


@torch.inference_mode()
def streams(args):
    """Memory and time of a long stream, method by method."""
    model = build(SMALL, args.layers, args.device, torch.float32 if args.device == "cpu" else torch.bfloat16)
    budget, rows = args.budget, []
    cuda = args.device == "cuda"
    window = min(32, budget // 4)
    for name, options in (
        ("streaming_llm", {}),
        ("morphkv", {"window": window}),
        ("h2o", {"decode": True}),
        ("tova", {"decode": True}),
    ):
        with attach(model):
            cache = FixedCache(model.config, create(name, budget=budget, **options))
            step = Step(model, cache, budget + 64)
            if cuda:
                step.capture()
            part = args.tokens // args.parts
            memory = [torch.cuda.memory_allocated() if cuda else cache.stats().nbytes]
            seconds = []
            for _ in range(args.parts):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(part):
                    step.run()
                if cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                memory.append(torch.cuda.memory_allocated() if cuda else cache.stats().nbytes)
            entries = cache.stats().layers[0].entries[0]
            seen = cache.stats().logical_tokens
        rows.append(
            {
                "method": name,
                "tokens": seen,
                "entries": entries,
                "bytes_before": memory[0],
                "bytes_after": memory[-1],
                "bytes_most": max(memory),
                "ms_first": seconds[0] / part * 1e3,
                "ms_last": seconds[-1] / part * 1e3,
                "part": part,
            }
        )
        print(
            f"{name:14s} {seen} tokens, {entries} entries, {memory[0]} -> {memory[-1]} bytes, first {part}: "
            f"{rows[-1]['ms_first']:.4f} ms, last {part}: {rows[-1]['ms_last']:.4f} ms a token",
            flush=True,
        )
    return {"layers": args.layers, "budget": budget, "rows": rows}


PARTS = {"steps": steps, "eager": eager, "streams": streams}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--full", type=int, default=32768)
    parser.add_argument("--no-full", action="store_true", help="without the caches of --full entries")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--parts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=128, help="tokens that are launched and timed")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 512], help="tokens between two evictions by knorm")
    parser.add_argument("--small", action="store_true", help="a model of a few MB, to try the program")
    parser.add_argument("--add", type=Path, help="what bench/peer_decode.py wrote in its own environment")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    result = {"part": args.part, **machine(args.device), **PARTS[args.part](args)}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
