"""Which tokens of a forward are real: the padding mask, read once a forward and shared by all layers."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows", "rows_of"]

_last = threading.local()


@dataclass(frozen=True)
class Rows:
    """The padding mask of one forward, on the host.

    Attributes:
        new: real tokens among the forward's own columns, a row.
        total: real tokens among all columns, a row.
        columns: columns of the mask.
        left_padded: no real token of this forward stands before padding.
    """

    new: list[int]
    total: list[int]
    columns: int
    left_padded: bool

    @property
    def is_full(self) -> bool:
        """Nothing is padded."""
        return all(total == self.columns for total in self.total)


def rows_of(mask: Tensor, num_new: int) -> Rows:
    """Reads a 2-D mask ``[batch, columns]`` bool whose last `num_new` columns are this forward's. One device read for each mask."""
    known = getattr(_last, "read", None)
    if known is not None and known[0]() is mask and known[1] == num_new:
        return known[2]
    new = mask[:, mask.shape[1] - num_new :]
    gaps = (new[:, :-1] & ~new[:, 1:]).sum(1)
    counts = torch.stack([new.sum(1), mask.sum(1), gaps]).tolist()
    rows = Rows(counts[0], counts[1], mask.shape[1], not any(counts[2]))
    _last.read = (weakref.ref(mask), num_new, rows)
    return rows
