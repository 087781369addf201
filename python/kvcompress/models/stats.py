"""What a compressed cache holds, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CacheStats", "LayerStats"]


@dataclass(frozen=True)
class LayerStats:
    """One compressed layer.

    Attributes:
        layer: which layer of the model.
        logical: real tokens seen, a row of the batch.
        entries: entries stored for each head, a row of the batch; their mean, rounded up, where heads differ.
        head_entries: entries of every head, a row of the batch.
        nbytes: bytes that its buffers hold, room for new tokens included.
        scorer: what the choice of the entries was based on.
    """

    layer: int
    logical: list[int]
    entries: list[int]
    head_entries: list[list[int]]
    nbytes: int
    scorer: str

    @property
    def rows(self) -> Iterable[tuple[int, int, list[int]]]:
        """Entries, tokens seen and entries of every head of each row."""
        return zip(self.entries, self.logical, self.head_entries)


@dataclass(frozen=True)
class CacheStats:
    """A whole cache.

    Attributes:
        method: what cut it, with parameters.
        logical_tokens: tokens seen, padding included.
        nbytes: bytes of all layers, those of sliding and linear layers, which are not compressed, included.
        layers: the compressed layers.
    """

    method: str
    logical_tokens: int
    nbytes: int
    layers: list[LayerStats]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists and dicts, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.logical_tokens} tokens in {_size(self.nbytes)}"]
        for layer in self.layers:
            rows = ", ".join(f"{kept}/{seen}{_spread(heads)}" for kept, seen, heads in layer.rows)
            lines.append(f"  layer {layer.layer:3d}: {rows} entries, {_size(layer.nbytes)}; {layer.scorer}")
        return "\n".join(lines)


def _spread(heads: list[int]) -> str:
    """The least and the most of the heads' entries, where they differ."""
    return f" ({min(heads)} to {max(heads)} a head)" if len(set(heads)) > 1 else ""


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
