"""`kvcompress generate`: any causal LM that transformers loads, its cache compressed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from kvcompress.cli import choose
from kvcompress.cli.console import fail, notes, print_json
from kvcompress.cli.progress import prefill_bar
from kvcompress.cli.report import bars, full_cache_bytes, per_layer, size, span

__all__ = ["generate"]

_LONG_PROMPT = 1024  # tokens from which on a bar is worth its line


def generate(
    model: Annotated[str, typer.Option(help="Folder with config.json, or a hub id.")],
    method: Annotated[str, typer.Option(help="`kvcompress methods` lists them; A+B runs B inside A; full keeps all.")],
    budget: Annotated[
        str, typer.Option(help="Entries a head keeps in each layer (1024), or their share (0.1).")
    ] = "1.0",
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with the prompt; - is stdin.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A parameter of the method, key=value.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    chunk: Annotated[int | None, typer.Option(min=1, help="Prefill in chunks of so many tokens.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto: the checkpoint's, float32 on the CPU.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing streamed.")] = False,
) -> None:
    """Answer a prompt with a compressed cache: stream the text, then show what the cache kept."""
    text = _prompt(prompt, prompt_file)
    chosen = choose.method(method, choose.parse_budget(budget), settings or ())
    on = choose.device(device)
    loaded, tokenizer = choose.load_model(model, on, dtype)
    from transformers import TextStreamer

    from kvcompress.models import CompressedCache, attach, cache_argument

    class Stream(TextStreamer):
        """Streams the answer, and notes when its tokens came."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if not as_json:
                super().on_finalized_text(text, stream_end)

    choose.fits(loaded, {method: chosen}, "--method")
    inputs = tokenizer(text, return_tensors="pt").to(on)
    tokens = inputs["input_ids"].shape[1]
    choose.takes(loaded, tokenizer, inputs["input_ids"].tolist(), "the prompt", new=max_new_tokens - 1)
    cache = CompressedCache(loaded.config, chosen, chunked_prefill=chunk is not None)
    stream = Stream()
    chunks = 1 if chunk is None else -(-tokens // chunk)
    started = time.perf_counter()
    with (
        choose.refused(),
        attach(loaded),
        torch.inference_mode(),
        prefill_bar(loaded, chunks, tokens >= _LONG_PROMPT and not as_json),
    ):
        output = loaded.generate(
            **inputs,
            **{cache_argument(loaded): cache},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=stream,
            prefill_chunk_size=chunk,
        )
    stats = cache.stats()
    steps = len(stream.times) - 1
    result = {
        "method": method,
        "parameters": "" if chosen is None else str(chosen),
        "text": tokenizer.decode(output[0, tokens:], skip_special_tokens=True),
        "prompt_tokens": tokens,
        "new_tokens": output.shape[1] - tokens,
        "kv_bytes": stats.nbytes,
        "full_kv_bytes": full_cache_bytes(loaded.config, stats.logical_tokens, loaded.dtype.itemsize),
        "kv_entries_per_layer": per_layer(stats),
        "logical_tokens": stats.logical_tokens,
        "prefill_s": stream.times[0] - started,
        "decode_s_per_token": (stream.times[-1] - stream.times[0]) / steps if steps else None,
    }
    if as_json:
        print_json(result)
    else:
        _show(result)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        fail("the prompt is given once", "give either --prompt TEXT or --prompt-file FILE")
    if prompt_file is None:
        text = prompt or ""
    elif str(prompt_file) == "-":
        text = sys.stdin.read()
    else:
        text = choose.read_text(prompt_file, "--prompt-file", or_else=", or - for stdin")
    if not text:
        fail("the prompt is empty", "give at least one word")
    return text


def _show(result: dict[str, Any]) -> None:
    kept = result["kv_entries_per_layer"]
    table = Table(title=result["parameters"] or result["method"], title_justify="left", show_header=False)
    table.add_row("tokens", f"{result['prompt_tokens']} prompt + {result['new_tokens']} new")
    table.add_row("entries per layer", f"{bars(kept, result['logical_tokens'])}  {span(kept)}")
    share = 100 * result["kv_bytes"] / result["full_kv_bytes"]
    full = size(result["full_kv_bytes"])
    table.add_row("KV cache", f"{size(result['kv_bytes'])}, {share:.0f} % of the {full} that all tokens take")
    table.add_row("prefill", f"{result['prefill_s']:.2f} s")
    if result["decode_s_per_token"] is not None:
        table.add_row("decode", f"{1000 * result['decode_s_per_token']:.1f} ms a token")
    notes().print(table)
