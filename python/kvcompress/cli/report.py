"""How caches are shown: bytes, bars of entries per layer, times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["bars", "full_cache_bytes", "per_layer", "size", "span"]

_BARS = " ▁▂▃▄▅▆▇█"


def size(number: float) -> str:
    """Bytes for people: 1.25 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def bars(entries: Sequence[int], highest: int) -> str:
    """One character a layer; `highest` entries and above fill it, one entry is never invisible."""
    steps = len(_BARS) - 1
    return "".join(_BARS[min(steps, -(-count * steps // max(highest, 1)))] for count in entries)


def span(entries: Sequence[int]) -> str:
    """ "410", or "57 ... 601" where layers differ."""
    low, high = min(entries), max(entries)
    return str(low) if low == high else f"{low} … {high}"


def per_layer(stats: Any) -> list[int]:
    """Entries that each layer keeps for each head: the mean over the rows of a batch."""
    return [round(sum(layer.entries) / len(layer.entries)) for layer in stats.layers]


def full_cache_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """What K and V of `tokens` tokens take in a cache that keeps all, for models whose layers are all alike."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * tokens * text.num_hidden_layers * heads * head_dim * itemsize
