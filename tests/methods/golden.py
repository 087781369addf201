"""One golden case: what an official implementation gave for some inputs (tests/golden/<method>/*.safetensors)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

# Keys that say how a case was made and leave nothing to replay.
DESCRIPTIVE = {"seed", "tie_safe", "columns", "kinds"}


class Golden:
    """Tensors by name, and parameters that must all be taken: an unknown one fails the replay instead of being skipped."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        self.method = metadata["method"]
        self.source = metadata["source"]
        self._params: dict[str, Any] = json.loads(metadata["params"])
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._params

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def take(self, name: str, *default: Any) -> Any:
        """A parameter's value; `default` where the case may lack it."""
        self._taken.add(name)
        return self._params.get(name, default[0]) if default else self._params[name]

    def choose(self, name: str, known: dict[str, Any], *default: str) -> Any:
        """What a parameter's value means to us; fails on a value that `known` lacks."""
        value = self.take(name, *default)
        assert value in known, f"{name} is {value!r}; this replay knows {sorted(known)}"
        return known[value]

    def ignore(self, *names: str) -> None:
        """Parameters that only repeat what the tensors' shapes say."""
        self._taken.update(names)

    def assert_all_taken(self) -> None:
        left = set(self._params) - self._taken - DESCRIPTIVE
        assert not left, f"parameters that this replay does not know: {sorted(left)}"


def rows(padded: Tensor) -> list[list[int]]:
    """The lines of a -1 padded table."""
    return [[x for x in line if x >= 0] for line in padded.tolist()]
