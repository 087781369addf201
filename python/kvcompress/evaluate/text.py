"""Any text as a task: how well a compressed cache agrees with the full one on what comes next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress.evaluate.tasks import Sample

__all__ = ["text_samples"]


def text_samples(path: Path, tokenizer: Any, *, length: int, count: int, answer: int = 128) -> list[Sample]:
    """Up to `count` stretches of `length` tokens, evenly spread; the last `answer` of each (at most a half) are the continuation.

    What counts is `agreement` (the same first choice as the full cache), `kl` and `perplexity`; `right` means that the whole
    continuation is the model's first choice, which hardly ever happens. A long continuation is the task for methods that
    evict while decoding: it is fed token by token, and `end_entries` says what the cache held at its end.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: the tokenizer must be a fast one, which says where in the text its tokens begin")
    text = path.read_text(errors="replace")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    behind = min(answer, length // 2)
    most = len(starts) // length
    if most == 0:
        raise ValueError(f"{path}: the text must have at least {length} tokens, got {len(starts)}")
    samples = []
    for number in range(min(count, most)):
        first = number * (len(starts) - length) // max(1, min(count, most) - 1) if number else 0
        cut = starts[first + length - behind]
        end = starts[first + length] if first + length < len(starts) else len(text)
        own = f"text-{path.name}-{length}-{behind}-{first}"  # whatever `count` was
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
