"""Any text as a task: how well a compressed cache agrees with the full one on what comes next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress.evaluate.tasks import Sample

__all__ = ["text_samples"]

_CONTINUATION = 128  # tokens whose prediction is compared


def text_samples(path: Path, tokenizer: Any, *, length: int, count: int) -> list[Sample]:
    """Up to `count` stretches of `length` tokens, evenly spread; the last 128 of each (at most a half) are the continuation.

    What counts is `agreement` (the same first choice as the full cache) and `kl`; `right` means that the whole continuation
    is the model's first choice, which hardly ever happens.
    """
    text = path.read_text(errors="replace")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    behind = min(_CONTINUATION, length // 2)
    most = len(starts) // length
    if most == 0:
        raise ValueError(f"{path}: the text must have at least {length} tokens, got {len(starts)}")
    samples = []
    for number in range(min(count, most)):
        first = number * (len(starts) - length) // max(1, min(count, most) - 1) if number else 0
        cut = starts[first + length - behind]
        end = starts[first + length] if first + length < len(starts) else len(text)
        own = f"text-{path.name}-{length}-{number}"
        samples.append(
            Sample(
                own,
                own,
                f"text:{path.name}",
                length,
                text[starts[first] : cut],
                "",
                "",
                text[cut:end],
                start="",
                end="",
            )
        )
    return samples
