"""Storing: what is written where?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from kvcompress import _check

__all__ = ["append_", "compact_", "compact_ragged_", "gather", "gather_ragged"]

_MAX_TENSORS = 8


def compact_(tensors: Sequence[Tensor], index: Tensor) -> None:
    """Moves the kept rows of every tensor to the front of its own buffer.

    ``tensor[b, h, i] = tensor[b, h, index[b, h, i]]`` for every slot i with an index of 0 or more. Rows behind the kept
    ones, and rows whose slot holds -1, keep what they held. Bytes are copied, whatever the dtype; a row that is in place
    already is not touched. There is no second buffer.

    Args:
        tensors: one to eight of ``[batch, heads, seq_len, head_dim]`` or ``[batch, heads, seq_len]``, changed in place; any
            dtypes of 1, 2, 4 or 8 bytes, any strides with a contiguous last dimension. They must not share memory.
        index: ``[batch, heads, k]`` int32, ascending, -1 at the end (as `topk` gives it), ``k <= seq_len``.

    Raises:
        ValueError, TypeError: ``compact_: argument must be ..., got ...``. Values of `index` are checked under
            `set_debug` only; entries out of range are skipped.

    Scratch: none.

    Example:
        >>> keys = torch.arange(6.0).view(1, 1, 6, 1)
        >>> kvcompress.compact_([keys], torch.tensor([[[1, 3, 5]]], dtype=torch.int32))
        >>> keys[0, 0, :3, 0]
        tensor([1., 3., 5.])
    """
    _check.call(torch.ops.kvcompress.compact_.default, tensors, index)


def compact_ragged_(tensors: Sequence[Tensor], index: Tensor, indptr: Tensor, row_start: Tensor) -> None:
    """Moves the kept rows of every head to the front of its own stretch of the packed buffers.

    ``tensor[row_start[r] + i] = tensor[row_start[r] + index[indptr[r] + i]]`` for every ``i < indptr[r + 1] - indptr[r]`` with
    an index of 0 or more, ``r = b * heads + h``. All other rows keep what they held: what a head drops becomes room behind
    its entries. Stretches stay where they are. There is no second buffer.

    Args:
        tensors: one to eight of ``[slots, head_dim]`` or ``[slots]``, changed in place; any dtypes of 1, 2, 4 or 8 bytes,
            contiguous in the last dimension. They must not share memory.
        index: ``[total]`` int32, entries counted from their head's first slot, ascending within a head; -1 at the end of a
            head's part is skipped. As `topk_ragged` gives it; a ``[batch, heads, k]`` index of `topk` is
            ``index.flatten()`` with ``indptr = arange(batch * heads + 1) * k``.
        indptr: ``[batch * heads + 1]`` int32, where the part of each head begins in `index`.
        row_start: ``[batch * heads]`` int64, the first slot of each head; stretches must not overlap nor leave the buffer.

    Raises:
        ValueError, TypeError: ``compact_ragged_: argument must be ..., got ...``. Values of `index` and `indptr` are checked
            under `set_debug` only, those of `row_start` are the caller's contract; entries below 0 or behind the buffer
            are skipped.

    Scratch: none.

    Example:
        >>> keys = torch.arange(8.0).view(8, 1)
        >>> index, indptr = torch.tensor([1, 3, 2], dtype=torch.int32), torch.tensor([0, 2, 3], dtype=torch.int32)
        >>> kvcompress.compact_ragged_([keys], index, indptr, torch.tensor([0, 5]))
        >>> keys[:, 0]
        tensor([1., 3., 2., 3., 4., 7., 6., 7.])
    """
    _check.call(torch.ops.kvcompress.compact_ragged_.default, tensors, index, indptr, row_start)


def gather(tensors: Sequence[Tensor], index: Tensor, *, capacity: int | None = None) -> list[Tensor]:
    """Copies the kept rows of every tensor into a new buffer with room behind them.

    ``out[b, h, i] = tensor[b, h // (heads / tensor heads), index[b, h, i]]``; slots whose index is -1, and slots from k to
    `capacity`, are zero. With more heads in `index` than in a tensor (a multiple), each query head gets its own copy.

    Args:
        tensors: one to eight of ``[batch, tensor heads, seq_len, head_dim]`` or ``[batch, tensor heads, seq_len]``; any
            dtypes of 1, 2, 4 or 8 bytes, any strides with a contiguous last dimension.
        index: ``[batch, heads, k]`` int32, -1 or in [0, seq_len); need not ascend, may repeat, k may exceed seq_len.
        capacity: slots of the new buffers, at least k; None: k.

    Returns:
        One contiguous ``[batch, heads, capacity, head_dim]`` or ``[batch, heads, capacity]`` for each tensor.

    Raises:
        ValueError, TypeError: ``gather: argument must be ..., got ...``. Values of `index` are checked under `set_debug`
            only; entries out of range give zeros.

    Scratch: none.

    Example:
        >>> keys = torch.arange(6.0).view(1, 1, 6, 1)
        >>> kept, = kvcompress.gather([keys], torch.tensor([[[1, 5]]], dtype=torch.int32), capacity=3)
        >>> kept[0, 0, :, 0]
        tensor([1., 5., 0.])
    """
    capacity = index.shape[-1] if capacity is None else capacity
    return _check.call(torch.ops.kvcompress.gather.default, tensors, index, capacity)


def gather_ragged(
    tensors: Sequence[Tensor], index: Tensor, indptr: Tensor, row_start: Tensor, *, total: int
) -> list[Tensor]:
    """Copies the kept rows of every tensor into one packed buffer, a stretch of its own for each row and head.

    With head ``r = b * heads + h``: ``out[row_start[r] + i] = tensor[b, h // (heads / tensor heads), index[indptr[r] + i]]`` for
    ``i < indptr[r + 1] - indptr[r]`` wherever the index is not -1; all other slots, so the room behind a head, are zero.

    Args:
        tensors: one to eight of ``[batch, tensor heads, seq_len, head_dim]`` or ``[batch, tensor heads, seq_len]``; any
            dtypes of 1, 2, 4 or 8 bytes, any strides with a contiguous last dimension.
        index: ``[entries]`` int32, -1 or in [0, seq_len), head after head, as `topk_ragged` gives it. (Rows of one length k,
            ``[batch, heads, k]``, are ``index.flatten()`` with ``indptr = k * arange(batch * heads + 1)``.)
        indptr: ``[batch * heads + 1]`` int32, where the part of each head begins; ascending.
        row_start: ``[batch * heads]`` int64, the first slot of each head; stretches must not overlap nor leave the buffer.
        total: slots of the packed buffers.

    Returns:
        One contiguous ``[total, head_dim]`` or ``[total]`` for each tensor.

    Raises:
        ValueError, TypeError: ``gather_ragged: argument must be ..., got ...``. Values of `index` and `indptr` are checked under
            `set_debug` only; those of `row_start` are the caller's contract.

    Scratch: none.

    Example:
        >>> keys = torch.arange(6.0).view(1, 2, 3, 1)
        >>> index, indptr = torch.tensor([0, 2, 1], dtype=torch.int32), torch.tensor([0, 2, 3], dtype=torch.int32)
        >>> packed, = kvcompress.gather_ragged([keys], index, indptr, torch.tensor([0, 3]), total=5)
        >>> packed[:, 0]
        tensor([0., 2., 0., 4., 0.])
    """
    return _check.call(torch.ops.kvcompress.gather_ragged.default, tensors, index, indptr, row_start, total)


def append_(buffers: Sequence[Tensor], rows: Sequence[Tensor], slots: Tensor) -> None:
    """Writes new rows into their slots of every buffer, in one launch.

    ``buffer[b, h, slots[b, t]] = rows[b, h, t]`` for every t with a slot of 0 or more; -1 marks padding and is skipped.

    Args:
        buffers: one to eight of ``[batch, heads, capacity, head_dim]`` or ``[batch, heads, capacity]``, changed in place;
            any dtypes of 1, 2, 4 or 8 bytes, any strides with a contiguous last dimension.
        rows: for each buffer its new rows, ``[batch, heads, n, head_dim]`` or ``[batch, heads, n]`` of the same dtype.
        slots: ``[batch, n]`` int32, -1 or in [0, capacity), none twice in a row.

    Raises:
        ValueError, TypeError: ``append_: argument must be ..., got ...``. Values of `slots` are checked under `set_debug`
            only; slots out of range are skipped.

    Scratch: none.

    Example:
        >>> keys = torch.zeros(1, 1, 4, 1)
        >>> kvcompress.append_([keys], [torch.ones(1, 1, 1, 1)], torch.tensor([[2]], dtype=torch.int32))
        >>> keys[0, 0, :, 0]
        tensor([0., 0., 1., 0.])
    """
    _check.call(torch.ops.kvcompress.append_.default, buffers, rows, slots)


# --- fakes: shapes, and the checks of csrc/store/row_list.cpp in the same words and order


def _check_row_list(
    op: str,
    argument: str,
    tensors: Sequence[Tensor],
    leading: str,
    anchor: Tensor,
    anchor_name: str,
    is_written: bool,
    dims: int = 3,
) -> None:
    _check.require(1 <= len(tensors) <= _MAX_TENSORS, op, argument, f"1 to {_MAX_TENSORS} tensors", len(tensors))
    for i, t in enumerate(tensors):
        at = f" at [{i}]"
        layout = f"[{leading}, head_dim] or [{leading}]"
        _check.require(t.dim() in (dims, dims + 1), op, argument, layout, f"{t.dim()}D {_check.shape_string(t)}{at}")
        size = t.element_size()
        _check.require(size <= 8, op, argument, "of elements of 1, 2, 4 or 8 bytes", f"{size}{at}")
        must = f"on the device of {anchor_name} ({anchor.device})"
        _check.require(t.device == anchor.device, op, argument, must, f"{t.device}{at}")
        contiguous = t.shape[-1] <= 1 or t.stride(-1) == 1
        got = f"a last stride of {t.stride(-1)}{at}"
        _check.require(contiguous, op, argument, "contiguous in the last dimension", got)
        for dim in range(t.dim() - 1 if is_written else 0):
            overlaps = t.shape[dim] > 1 and t.stride(dim) == 0
            _check.require(
                not overlaps, op, argument, "free of overlapping rows", f"a stride of 0 in dimension {dim}{at}"
            )


def _check_index(op: str, index: Tensor) -> None:
    _check.rank(op, "index", index, 3, "[batch, heads, k]")
    _check.dtype(op, "index", index, torch.int32)
    _check.last_contiguous(op, "index", index)


@library.register_fake("kvcompress::compact_")
def _(tensors: Sequence[Tensor], index: Tensor) -> None:
    op = "compact_"
    _check_index(op, index)
    _check_row_list(op, "tensors", tensors, "batch, heads, seq_len", index, "index", is_written=True)
    first = tensors[0]
    batch, heads, seq_len = first.shape[:3]
    for i, t in enumerate(tensors):
        must = f"of the batch, heads and seq_len of tensors[0] {_check.shape_string(first)}"
        _check.require(t.shape[:3] == first.shape[:3], op, "tensors", must, f"{_check.shape_string(t)} at [{i}]")
    same = index.shape[:2] == first.shape[:2]
    _check.require(same, op, "index", f"[{batch}, {heads}, k]", _check.shape_string(index))
    must = f"of at most seq_len ({seq_len}) entries a head"
    _check.require(index.shape[2] <= seq_len, op, "index", must, index.shape[2])


@library.register_fake("kvcompress::compact_ragged_")
def _(tensors: Sequence[Tensor], index: Tensor, indptr: Tensor, row_start: Tensor) -> None:
    op = "compact_ragged_"
    _check.rank(op, "index", index, 1, "[total]")
    _check.dtype(op, "index", index, torch.int32)
    _check.last_contiguous(op, "index", index)
    _check_row_list(op, "tensors", tensors, "slots", index, "index", is_written=True, dims=1)
    slots = tensors[0].shape[0]
    for i, t in enumerate(tensors):
        must = f"of the slots of tensors[0] ({slots})"
        _check.require(t.shape[0] == slots, op, "tensors", must, f"{_check.shape_string(t)} at [{i}]")
    _check.rank(op, "row_start", row_start, 1, "[batch * heads]")
    _check.dtype(op, "row_start", row_start, torch.int64)
    _check.same_device(op, "row_start", row_start, index, "index")
    _check.last_contiguous(op, "row_start", row_start)
    heads = row_start.shape[0]
    ok = indptr.dim() == 1 and indptr.shape[0] == heads + 1
    got = f"{indptr.dim()}D {_check.shape_string(indptr)}"
    _check.require(ok, op, "indptr", f"[batch * heads + 1] ({heads + 1})", got)
    _check.dtype(op, "indptr", indptr, torch.int32)
    _check.same_device(op, "indptr", indptr, index, "index")
    _check.last_contiguous(op, "indptr", indptr)


@library.register_fake("kvcompress::gather")
def _(tensors: Sequence[Tensor], index: Tensor, capacity: int) -> list[Tensor]:
    op = "gather"
    _check_index(op, index)
    _check_row_list(op, "tensors", tensors, "batch, heads, seq_len", index, "index", is_written=False)
    batch, heads, k = index.shape
    seq_len = tensors[0].shape[2]
    for i, t in enumerate(tensors):
        must = f"of the batch of index ({batch}) and the seq_len of tensors[0] ({seq_len})"
        same = t.shape[0] == batch and t.shape[2] == seq_len
        _check.require(same, op, "tensors", must, f"{_check.shape_string(t)} at [{i}]")
        multiple = heads == 0 if t.shape[1] == 0 else heads % t.shape[1] == 0
        _check.require(multiple, op, "index", f"of a multiple of {t.shape[1]} heads", f"{heads} at [{i}]")
    _check.require(capacity >= k, op, "capacity", f"at least k ({k})", capacity)
    return [t.new_empty((batch, heads, capacity, *t.shape[3:])) for t in tensors]


@library.register_fake("kvcompress::gather_ragged")
def _(tensors: Sequence[Tensor], index: Tensor, indptr: Tensor, row_start: Tensor, total: int) -> list[Tensor]:
    op = "gather_ragged"
    _check.rank(op, "index", index, 1, "[entries]")
    _check.dtype(op, "index", index, torch.int32)
    _check.last_contiguous(op, "index", index)
    _check_row_list(op, "tensors", tensors, "batch, heads, seq_len", index, "index", is_written=False)
    batch, seq_len = tensors[0].shape[0], tensors[0].shape[2]
    rows = indptr.shape[0] - 1 if indptr.dim() == 1 else -1
    fits = rows >= 0 and (rows == 0 if batch == 0 else rows % batch == 0)
    must = f"[batch * heads + 1] for a batch of {batch}"
    _check.require(fits, op, "indptr", must, f"{indptr.dim()}D {_check.shape_string(indptr)}")
    _check.dtype(op, "indptr", indptr, torch.int32)
    _check.same_device(op, "indptr", indptr, index, "index")
    _check.last_contiguous(op, "indptr", indptr)
    heads = 0 if batch == 0 else rows // batch
    for i, t in enumerate(tensors):
        same = t.shape[0] == batch and t.shape[2] == seq_len
        must = f"of the batch ({batch}) and seq_len ({seq_len}) of tensors[0]"
        _check.require(same, op, "tensors", must, f"{_check.shape_string(t)} at [{i}]")
        multiple = heads == 0 if t.shape[1] == 0 else heads % t.shape[1] == 0
        _check.require(multiple, op, "indptr", f"of a multiple of {t.shape[1]} heads", f"{heads} at [{i}]")
    ok = row_start.dim() == 1 and row_start.shape[0] == rows
    got = f"{row_start.dim()}D {_check.shape_string(row_start)}"
    _check.require(ok, op, "row_start", f"[batch * heads] ({rows})", got)
    _check.dtype(op, "row_start", row_start, torch.int64)
    _check.same_device(op, "row_start", row_start, index, "index")
    _check.last_contiguous(op, "row_start", row_start)
    _check.require(total >= 0, op, "total", "at least 0", total)
    return [t.new_empty((total, *t.shape[3:])) for t in tensors]


@library.register_fake("kvcompress::append_")
def _(buffers: Sequence[Tensor], rows: Sequence[Tensor], slots: Tensor) -> None:
    op = "append_"
    _check.rank(op, "slots", slots, 2, "[batch, n]")
    _check.dtype(op, "slots", slots, torch.int32)
    _check.last_contiguous(op, "slots", slots)
    _check_row_list(op, "buffers", buffers, "batch, heads, capacity", slots, "slots", is_written=True)
    _check_row_list(op, "rows", rows, "batch, heads, n", slots, "slots", is_written=False)
    _check.require(len(rows) == len(buffers), op, "rows", f"as many tensors as buffers ({len(buffers)})", len(rows))
    batch, n = slots.shape
    capacity = buffers[0].shape[2]
    for i, (buffer, new) in enumerate(zip(buffers, rows)):
        _check.same_dtype(op, "rows", new, buffer, "buffers")
        must = f"of the batch of slots ({batch}) and the capacity of buffers[0] ({capacity})"
        same = buffer.shape[0] == batch and buffer.shape[2] == capacity
        _check.require(same, op, "buffers", must, f"{_check.shape_string(buffer)} at [{i}]")
        must = f"of the shape of buffers {_check.shape_string(buffer)} with n ({n}) for the capacity"
        same = new.shape == (*buffer.shape[:2], n, *buffer.shape[3:])
        _check.require(same, op, "rows", must, f"{_check.shape_string(new)} at [{i}]")
