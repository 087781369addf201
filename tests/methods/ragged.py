"""Ragged stores, head by head, for the tests and replays of methods whose heads keep different numbers of entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.cache import Store


def kept(store: Store, row: int = 0) -> list[list[int]]:
    """Kept positions of each head of a row."""
    return [line[line >= 0].tolist() for line in store.padded_positions()[row]]


def assert_rows(store: Store, flat: dict[str, Tensor], positions: Sequence[Sequence[int]]) -> None:
    """A batch of one holds the packed rows `flat`, head after head, of entries `positions` (any order inside a head)."""
    state, ours = store.state_dict(), kept(store)
    assert ours == [sorted(head) for head in positions]
    order, start = [], 0
    for head in positions:
        order += [start + i for i in sorted(range(len(head)), key=head.__getitem__)]
        start += len(head)
    for name, rows in flat.items():
        assert torch.equal(state[name], rows[torch.tensor(order)]), name
