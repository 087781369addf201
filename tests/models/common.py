"""What the tests of the model loop share: methods to try, prompts, and one way to run them."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcompress.methods import create
from kvcompress.models import CompressedCache, attach
from kvcompress.when import EveryStep

PROMPT, BUDGET = 90, 30


def methods(budget=BUDGET):
    """The methods of the registry that these tests know parameters for."""
    snapkv = create("snapkv", budget=budget, window=8, kernel_size=3)
    streaming = create("streaming_llm", budget=budget)
    sliding = create("sliding_window", budget=budget)
    return {
        "snapkv": snapkv,
        "snapkv_q_heads": create("snapkv", budget=budget, window=8, kernel_size=3, group_reduce="none"),
        "snapkv_adakv": create("adakv", budget=budget, inner=snapkv),
        "snapkv_adakv_q_heads": create("adakv", budget=budget, inner=replace(snapkv, group_reduce="none")),
        "squeeze_snapkv_adakv": create(
            "squeeze_attention", budget=budget, inner=create("adakv", budget=budget, inner=snapkv), p=0.5
        ),
        "snapkv_lava": create("lava", budget=budget, window=8, kernel_size=3),
        "streaming_llm": streaming,
        "streaming_llm_once": create("streaming_llm", budget=budget, rolling=False),
        "sliding_window": sliding,
        "h2o_decode": create("h2o", budget=budget, decode=True),
        "morphkv": create("morphkv", budget=budget, window=8),
        "snapkv_every": create("while_decoding", budget=budget, inner=snapkv, every=4),
        "squeeze_snapkv": create("squeeze_attention", budget=budget, inner=snapkv, p=0.5),
        "squeeze_streaming": create("squeeze_attention", budget=budget, inner=streaming, p=0.5),
        "squeeze_sliding": create("squeeze_attention", budget=budget, inner=sliding, p=0.5),
    }


NAMES = list(methods())
EVICTING = [name for name in NAMES if isinstance(methods()[name].stages().when, EveryStep)]
CUT_ONCE = [name for name in NAMES if name not in EVICTING]


def on_top(name, steps):
    """Entries above the budget that a method holds after `steps` decoded tokens: MorphKV's newest, the start of a burst."""
    return {"morphkv": 1, "snapkv_every": steps % 4}.get(name, 0)


def method(name, budget=BUDGET):
    return methods(budget)[name]


def prompt(model, length=PROMPT, batch=1, seed=0):
    """Tokens with repeats, so that prompt lookup finds drafts."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(2, 97, (batch, length - length // 2), generator=generator)
    return torch.cat([half, half[:, : length // 2]], 1).to(model.device)


def distinct(model, length, seed):
    """Tokens that come once each."""
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randperm(95, generator=generator)[None, :length].to(model.device)


def padded(rows):
    """Left-padded batch and its mask."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    return ids, (ids != 0).long()


def generate(model, cache, ids, new=12, attached=True, **options):
    """Tokens behind the prompt and their raw logits ``[batch, new, vocab]``."""
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, **options}

    def run():
        return model.generate(ids, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options)

    if attached:
        with attach(model):
            out = run()
    else:
        out = run()
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def cache_of(model, method, **options):
    return CompressedCache(model.config, method, **options)


def entries(cache):
    return [layer.entries for layer in cache.stats().layers]
