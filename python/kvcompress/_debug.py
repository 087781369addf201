"""The debug switch of the ops."""

from __future__ import annotations

import torch

__all__ = ["set_debug"]


def set_debug(enabled: bool) -> None:
    """Turns the checks of index values on or off, for the whole process.

    An op cannot see on the host whether an index on the device is in range: that is the caller's contract. With the
    switch on, `topk`, `compact_`, `gather` and `append_` look at the values before they write, wait for the GPU and raise
    ``op: argument must be ..., got 7 at [0, 1, 2]``. It begins as ``KVCOMPRESS_DEBUG=1`` says, else off. Not for use
    under CUDA graph capture.

    Args:
        enabled: whether to check.

    Example:
        >>> kvcompress.set_debug(True)
    """
    torch.ops.kvcompress.set_debug(enabled)
