"""What a compressed cache really frees: bytes as torch's allocator reports them, during a prefill and after it.

A model of Llama 3.1 8B's shape with random weights reads one prompt with every method, and without any cache. The difference to the
run without a cache, taken at the end of every decoder layer, is what the cache holds at that moment; after the prefill,
everything but the weights is the cache. Beside it: what the stores themselves report, and the bound that the method states.

    python -m bench.memory --seq-len 32768 --budget 0.1 --method snapkv adakv lava --out memory.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from pathlib import Path

import torch
import transformers

from bench.e2e import build
from kvcompress.methods import create
from kvcompress.models import CompressedCache, attach


@torch.inference_mode()
def prefill(model, ids, cache):
    """Bytes beyond the weights: at the end of each decoder layer, at the peak, and after the prefill."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start, ends = torch.cuda.memory_allocated(), []
    hooks = [
        layer.register_forward_hook(lambda *_: ends.append(torch.cuda.memory_allocated() - start))
        for layer in model.model.layers
    ]
    began = time.perf_counter()
    with attach(model) if cache is not None else contextlib.nullcontext():
        options = {"use_cache": False} if cache is None else {"past_key_values": cache}
        model(ids, logits_to_keep=1, **options)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    for hook in hooks:
        hook.remove()
    return {
        "seconds": seconds,
        "ends": ends,
        "peak_bytes": torch.cuda.max_memory_allocated() - start,
        "held_bytes": torch.cuda.memory_allocated() - start,
    }


def report(name, run, without, cache, full_bytes, layers):
    during = [held - plain for held, plain in zip(run["ends"], without["ends"])]
    stores = cache.stats()
    heads = [layer.head_entries for layer in stores.layers]
    return {
        "run": name,
        "prefill_s": run["seconds"],
        "held_bytes": run["held_bytes"],
        "share_of_full": run["held_bytes"] / full_bytes,
        "reported_bytes": stores.nbytes,
        "entries": sum(n for rows in heads for row in rows for n in row),
        "least_and_most_a_head": [
            min(map(min, (row for rows in heads for row in rows))),
            max(map(max, (r for h in heads for r in h))),
        ],
        "most_held_at_a_layers_end": max(during),
        "full_layer_bytes": full_bytes // layers,
        "prefill_peak_bytes": run["peak_bytes"],
        "prefill_peak_without_cache": without["peak_bytes"],
        "held_at_layer_ends": during,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="*", default=["snapkv", "adakv", "lava", "squeeze_attention"])
    parser.add_argument("--budget", type=float, default=0.1, help="entries a layer, or a share below 1")
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--small", action="store_true", help="a small shape, to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.device = "cuda"
    torch.manual_seed(0)
    model = build(args)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.seq_len), device="cuda")
    budget = args.budget if args.budget < 1 else int(args.budget)

    runs = {"full cache": None, **{name: create(name, budget=budget) for name in args.method}}
    for method in runs.values():  # warm-up: workspaces of libraries are no part of the cache
        prefill(model, ids[:, :512], CompressedCache(model.config, method))
    without, results, full_bytes = prefill(model, ids, None), [], None
    for name, method in runs.items():
        cache = CompressedCache(model.config, method)
        run = prefill(model, ids, cache)
        full_bytes = full_bytes or run["held_bytes"]
        results.append(report(name if method is None else str(method), run, without, cache, full_bytes, args.layers))
        print(json.dumps({key: value for key, value in results[-1].items() if key != "held_at_layer_ends"}), flush=True)
        del cache
    out = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "results": results,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
