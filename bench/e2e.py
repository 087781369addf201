"""A whole model: prefill time, decode time a token and peak memory of a compressed cache beside transformers' DynamicCache.

The weights are random, of the shape of Llama 3.1 8B unless --layers says fewer: time and memory do not depend on their values.

    python bench/e2e.py --seq-len 32768 --batch 1 --method snapkv --budget 1024 --out e2e.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.shapes import LLAMA_8B, SMALL
from kvcompress.methods import create
from kvcompress.models import CompressedCache, attach


def build(args):
    shape = {**(SMALL if args.small else LLAMA_8B), "num_hidden_layers": args.layers}
    config = LlamaConfig(**shape, eos_token_id=None, attn_implementation="sdpa")
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device):
    sync(device)
    return time.perf_counter()


@torch.inference_mode()
def measure(model, ids, make_cache, args):
    """One prompt and `--new` greedy tokens; the first `--warmup` tokens are not counted."""
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    cache = make_cache()
    start = clock(args.device)
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    prefill = clock(args.device) - start
    prefill_peak = torch.cuda.max_memory_allocated() - weights if args.device == "cuda" else None
    steps = []
    for _ in range(args.new):
        start = clock(args.device)
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache, logits_to_keep=1).logits
        steps.append(1e3 * (clock(args.device) - start))
    steps = sorted(steps[args.warmup :])
    held = torch.cuda.memory_allocated() - weights if args.device == "cuda" else None
    peak = torch.cuda.max_memory_allocated() - weights if args.device == "cuda" else None
    if isinstance(cache, CompressedCache):
        entries = [layer.entries for layer in cache.stats().layers]
        nbytes = cache.stats().nbytes
    else:
        entries = [[layer.keys.shape[2]] * layer.keys.shape[0] for layer in cache.layers]
        nbytes = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return {
        "prefill_s": prefill,
        "decode_ms_per_token": statistics.median(steps),
        "decode_ms_p10": steps[len(steps) // 10],
        "decode_ms_p90": steps[len(steps) * 9 // 10],
        "kv_bytes": nbytes,
        "entries_mean": statistics.mean(n for rows in entries for n in rows),
        "prefill_peak_bytes": prefill_peak,  # beyond the weights, as all that follow
        "peak_bytes": peak,
        "held_bytes": held,
    }


def runs(model, args):
    config, budget = model.config, args.budget if args.budget < 1 else int(args.budget)
    yield "DynamicCache (sdpa)", lambda: DynamicCache(config=config), False
    if args.device == "cuda":
        yield "DynamicCache (sdpa, no cuDNN)", lambda: DynamicCache(config=config), None
    yield "full cache", lambda: CompressedCache(config, None), True
    for name in args.method:
        method = create(name, budget=budget)
        yield str(method), lambda method=method: CompressedCache(config, method), True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="*", default=["snapkv", "squeeze_attention"])
    parser.add_argument("--budget", type=float, default=1024, help="entries a layer, or a share below 1")
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new", type=int, default=80)
    parser.add_argument("--warmup", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a small shape, to try the script without a GPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.new <= args.warmup:
        parser.error(f"--new must be more than --warmup ({args.warmup}), got {args.new}")

    torch.manual_seed(0)
    model = build(args)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.seq_len), device=args.device)
    results = []
    for name, make_cache, attached in runs(model, args):
        with attach(model) if attached else contextlib.nullcontext():
            cudnn = torch.backends.cuda.cudnn_sdp_enabled()
            if attached is None:
                torch.backends.cuda.enable_cudnn_sdp(False)
            try:
                measure(model, ids[:, : min(512, args.seq_len)], make_cache, args)  # warm-up on like data
                row = {"run": name, **measure(model, ids, make_cache, args)}
            except torch.OutOfMemoryError as error:
                row = {"run": name, "error": str(error).split(". ")[0]}
            finally:
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
        results.append(row)
        print(json.dumps(row), flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu"
    report = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "results": results,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
