"""One wrong call: what every op must refuse with the same sentence from CPU, CUDA and fake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bad:
    """`make(device)` gives the op's full argument tuple; `words` must stand in the error, after the op's name."""

    name: str
    make: Callable[[str], tuple[Any, ...]]
    words: str
    reads_data: bool = False  # only values show the fault (debug switch): no fake can see it
