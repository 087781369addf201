"""A peer's eviction while decoding, in a process of its own: kvpress wants an older transformers than ours.

DecodingPress over the norms of the keys, at a target of --budget entries, evicting with every token and, as by its default,
every 512; the model of `bench.decode`, launched step by step, SDPA without cuDNN (which plans anew for every length). Beside it the
same model and environment with a DynamicCache that keeps the same number of entries and evicts nothing.

    PYTHONPATH=FOLDER-WITH-KVPRESS python bench/peer_decode.py --out peer.json
    python -m bench.decode eager --add peer.json --out decode_eager.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.peers import kvpress_decoding
from bench.shapes import LLAMA_8B, SMALL


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    shape = SMALL if args.small else LLAMA_8B
    config = LlamaConfig(**shape, num_hidden_layers=args.layers, eos_token_id=None, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32 if args.device == "cpu" else torch.bfloat16)
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def timed(model: LlamaForCausalLM, press, args: argparse.Namespace, steps: int) -> dict:
    """ms a token over `steps` tokens behind a prompt of the budget, after a warm-up of eight."""
    cache = DynamicCache()
    token = torch.zeros(1, 1, dtype=torch.int64, device=args.device)
    with contextlib.nullcontext() if press is None else press(model):
        model(
            torch.zeros(1, args.budget, dtype=torch.int64, device=args.device), past_key_values=cache, logits_to_keep=1
        )
        seen, taken = args.budget, []
        for _ in range(8 + steps):
            sync(args.device)
            start = time.perf_counter()
            position = torch.tensor([seen], device=args.device)
            out = model(token, past_key_values=cache, position_ids=position[None], cache_position=position)
            token = out.logits[:, -1:].argmax(-1)
            sync(args.device)
            taken.append((time.perf_counter() - start) * 1e3)
            seen += 1
    taken = taken[8:]
    return {
        "ms": statistics.fmean(taken),
        "median_ms": statistics.median(taken),
        "entries": cache.layers[0].keys.shape[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 512], help="tokens between two evictions")
    parser.add_argument("--small", action="store_true", help="a model of a few MB, to try the program")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    presses = kvpress_decoding()
    name = "kvpress DecodingPress"
    if isinstance(presses, str):
        result: dict = {"absent": {name: presses}}
    else:
        torch.backends.cuda.enable_cudnn_sdp(False)
        model = build(args)
        rows = [{"cache": "DynamicCache, nothing evicted", **timed(model, None, args, args.steps)}]
        for every in args.every:
            found = timed(model, presses(args.budget, every), args, max(args.steps, every))
            rows.append({"cache": f"{name}, knorm, every {every}", **found})
        about = {"kvpress": version("kvpress"), "transformers": transformers.__version__}
        for row in rows:
            row.update(about, launched=True)
            print(f"{row['cache']:44s} {row['ms']:8.3f} ms a token, {row['entries']} entries")
        result = {"rows": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(result.get("absent", ""))


if __name__ == "__main__":
    main()
