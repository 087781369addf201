"""Selection: which entries are kept?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, library

from kvcompress import _check

__all__ = ["TopK", "TopKRecent", "head_counts", "topk", "topk_ragged"]

_MAX_INT32 = 2**31 - 1
_MAX_HEADS = 1024


def topk(
    scores: Tensor,
    k: int,
    *,
    sink: int = 0,
    window: int = 0,
    counts: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
) -> Tensor:
    """The positions of the k entries of each head that matter most, ascending.

    The first `sink` and the last `window` real entries of a row are kept before any other, then the largest scores. Exact
    and deterministic: equal scores go to the smaller position, as do forced entries where not all fit. Scores rank
    ``+inf > numbers > -inf > NaN``; NaN of either sign is taken only when nothing else is left, and -0 equals +0.

    Args:
        scores: ``[batch, heads, seq_len]`` float32, higher = keep; any strides with a contiguous last dimension.
        k: entries kept a head, in [0, seq_len].
        sink: real entries at the front that are always kept.
        window: real entries at the end that are always kept; ``sink + window <= k``.
        counts: ``[batch]`` int32, entries kept of each row where that is fewer than k; None: k.
        seq_start: ``[batch]`` int32, first real entry of each row (left padding); None: 0.
        seq_end: ``[batch]`` int32, one behind the last real entry; None: seq_len.

    Returns:
        ``[batch, heads, k]`` int32: the ``min(counts[b], k, real entries)`` kept positions, ascending, then -1.

    Raises:
        ValueError, TypeError: ``topk: argument must be ..., got ...``.

    Scratch on CUDA: none, but where rows of 100,000 entries or more, before sm_90 of 32768, are at most a quarter as many
    as multiprocessors, up to three times the bytes of `scores`. On the CPU 8 bytes an entry of a row for each thread.

    Example:
        >>> scores = torch.tensor([[[0.1, 0.9, 0.5, 0.7, 0.2]]])
        >>> kvcompress.topk(scores, 3, window=1)
        tensor([[[1, 3, 4]]], dtype=torch.int32)
    """
    return _check.call(torch.ops.kvcompress.topk.default, scores, counts, seq_start, seq_end, k, sink, window)


@library.register_fake("kvcompress::topk")
def _(
    scores: Tensor,
    counts: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    k: int,
    sink: int,
    window: int,
) -> Tensor:
    op = "topk"
    _check.rank(op, "scores", scores, 3, "[batch, heads, seq_len]")
    _check.dtype(op, "scores", scores, torch.float32)
    _check.last_contiguous(op, "scores", scores)
    batch, heads, seq_len = scores.shape
    _check.require(seq_len <= _MAX_INT32, op, "scores", f"of at most {_MAX_INT32} entries a head", seq_len)
    for name, vector in (("counts", counts), ("seq_start", seq_start), ("seq_end", seq_end)):
        _check.row_vector(op, name, vector, batch, scores, "scores")
    _check.require(k >= 0, op, "k", f"in [0, seq_len] ([0, {seq_len}])", k)
    _check.require(k <= seq_len, op, "k", f"in [0, seq_len] ([0, {seq_len}])", k)
    _check.require(sink >= 0, op, "sink", "at least 0", sink)
    _check.require(window >= 0, op, "window", "at least 0", window)
    _check.require(window <= k - sink, op, "window", f"at most k - sink ({k - sink})", window)
    return scores.new_empty((batch, heads, k), dtype=torch.int32)


def topk_ragged(
    scores: Tensor,
    counts: Tensor,
    *,
    total: int,
    sink: int = 0,
    window: int = 0,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`topk` with a number of entries for every head, its rows packed one behind the other.

    ``index[indptr[r] : indptr[r + 1]]`` are the kept positions of row ``r = b * heads + h``, ascending: the same set, ties
    and order as `topk` with ``k = counts[b, h]``. `counts` stay on the device; only their sum must be known on the host, so
    nothing waits.

    Args:
        scores: ``[batch, heads, seq_len]`` float32, higher = keep; any strides with a contiguous last dimension.
        counts: ``[batch, heads]`` int32, entries kept of each head, at least 0; at most the real entries are kept.
        total: slots of `index`, the sum of what is kept; rows that do not fit are cut short, slots too many hold -1.
        sink, window, seq_start, seq_end: as in `topk`; a head that keeps fewer than sink + window keeps the first of them.

    Returns:
        ``[total]`` int32 and ``[batch * heads + 1]`` int32.

    Raises:
        ValueError, TypeError: ``topk_ragged: argument must be ..., got ...``.

    Scratch: as `topk`.

    Example:
        >>> scores = torch.tensor([[[0.1, 0.9, 0.5], [0.7, 0.2, 0.8]]])
        >>> kvcompress.topk_ragged(scores, torch.tensor([[1, 2]], dtype=torch.int32), total=3)
        (tensor([1, 0, 2], dtype=torch.int32), tensor([0, 1, 3], dtype=torch.int32))
    """
    return _check.call(
        torch.ops.kvcompress.topk_ragged.default, scores, counts, seq_start, seq_end, total, sink, window
    )


@library.register_fake("kvcompress::topk_ragged")
def _(
    scores: Tensor,
    counts: Tensor,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
    total: int,
    sink: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    op = "topk_ragged"
    _check.rank(op, "scores", scores, 3, "[batch, heads, seq_len]")
    _check.dtype(op, "scores", scores, torch.float32)
    _check.last_contiguous(op, "scores", scores)
    batch, heads, seq_len = scores.shape
    _check.require(seq_len <= _MAX_INT32, op, "scores", f"of at most {_MAX_INT32} entries a head", seq_len)
    _check.rank(op, "counts", counts, 2, "[batch, heads]")
    _check.dtype(op, "counts", counts, torch.int32)
    _check.same_device(op, "counts", counts, scores, "scores")
    shape = counts.shape[0] == batch and counts.shape[1] == heads
    _check.require(shape, op, "counts", f"[{batch}, {heads}]", _check.shape_string(counts))
    for name, vector in (("seq_start", seq_start), ("seq_end", seq_end)):
        _check.row_vector(op, name, vector, batch, scores, "scores")
    _check.require(total >= 0, op, "total", f"in [0, {_MAX_INT32}]", total)
    _check.require(total <= _MAX_INT32, op, "total", f"in [0, {_MAX_INT32}]", total)
    _check.require(sink >= 0, op, "sink", "at least 0", sink)
    _check.require(window >= 0, op, "window", "at least 0", window)
    return scores.new_empty((total,), dtype=torch.int32), scores.new_empty((batch * heads + 1,), dtype=torch.int32)


def head_counts(
    scores: Tensor,
    totals: Tensor,
    *,
    floors: Tensor | None = None,
    caps: Tensor | None = None,
    seq_start: Tensor | None = None,
    seq_end: Tensor | None = None,
) -> Tensor:
    """How many entries each head keeps when all heads of a row compete in one list.

    Of row b the ``totals[b]`` best entries are taken, whatever their head, but each head first gets its own best
    ``floors[b, h]`` and none gets more than ``caps[b, h]``. With C_h(t) the entries of head h that rank at least t, this is
    ``counts[b, h] = clamp(C_h(t), floors[b, h], caps[b, h])`` at the t where the counts sum to the total; entries equal to
    t go to the smaller head, then to the smaller position. Scores rank as in `topk`. `topk_ragged` takes the counts as they
    are: from scores to kept entries nothing waits for the device. AdaKV (arXiv 2407.11550) calls the floor its safeguard.

    Args:
        scores: ``[batch, heads, seq_len]`` float32, higher = keep; at most 1024 heads and 2^31 - 1 entries a row.
        totals: ``[batch]`` int32, entries of all heads of a row; below the floors the floors are kept, above the caps the caps.
        floors: ``[batch, heads]`` int32, contiguous; None: 0. Lowered to the cap.
        caps: ``[batch, heads]`` int32, contiguous; None: none. Lowered to the real entries.
        seq_start: ``[batch]`` int32, first real entry of each row (left padding); None: 0.
        seq_end: ``[batch]`` int32, one behind the last real entry; None: seq_len.

    Returns:
        ``[batch, heads]`` int32.

    Raises:
        ValueError, TypeError: ``head_counts: argument must be ..., got ...``.

    Scratch: none on CUDA; ``8 KiB * heads`` on the CPU.

    Example:
        >>> scores = torch.tensor([[[0.1, 0.9, 0.8], [0.7, 0.2, 0.3]]])
        >>> kvcompress.head_counts(scores, torch.tensor([2], dtype=torch.int32))
        tensor([[2, 0]], dtype=torch.int32)
        >>> kvcompress.head_counts(scores, torch.tensor([2]).int(), floors=torch.tensor([[1, 1]]).int())
        tensor([[1, 1]], dtype=torch.int32)
    """
    return _check.call(torch.ops.kvcompress.head_counts.default, scores, totals, floors, caps, seq_start, seq_end)


@library.register_fake("kvcompress::head_counts")
def _(
    scores: Tensor,
    totals: Tensor,
    floors: Tensor | None,
    caps: Tensor | None,
    seq_start: Tensor | None,
    seq_end: Tensor | None,
) -> Tensor:
    op = "head_counts"
    _check.rank(op, "scores", scores, 3, "[batch, heads, seq_len]")
    _check.dtype(op, "scores", scores, torch.float32)
    _check.last_contiguous(op, "scores", scores)
    batch, heads, seq_len = scores.shape
    _check.require(heads <= _MAX_HEADS, op, "scores", f"of at most {_MAX_HEADS} heads", heads)
    must = f"of at most {_MAX_INT32} entries a row"
    _check.require(heads * seq_len <= _MAX_INT32, op, "scores", must, heads * seq_len)
    _check.row_vector(op, "totals", totals, batch, scores, "scores")
    for name, t in (("floors", floors), ("caps", caps)):
        if t is not None:
            _check.rank(op, name, t, 2, "[batch, heads]")
            _check.dtype(op, name, t, torch.int32)
            _check.same_device(op, name, t, scores, "scores")
            same = t.shape[0] == batch and t.shape[1] == heads
            _check.require(same, op, name, f"[{batch}, {heads}]", _check.shape_string(t))
            _check.require(t.is_contiguous(), op, name, "contiguous", "strides that are not")
    for name, vector in (("seq_start", seq_start), ("seq_end", seq_end)):
        _check.row_vector(op, name, vector, batch, scores, "scores")
    return scores.new_empty((batch, heads), dtype=torch.int32)


# --- select stages


@dataclass(frozen=True)
class TopK:
    """`topk` per head, as a stage: the first `sink` and the last `window` real entries, then the largest scores."""

    sink: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        for name in ("sink", "window"):
            if getattr(self, name) < 0:
                raise ValueError(f"TopK: {name} must be at least 0, got {getattr(self, name)}")

    @property
    def forced(self) -> int:
        return self.sink + self.window

    def __call__(
        self, scores: Tensor, counts: Sequence[int], *, seq_start: Tensor | None = None, seq_end: Tensor | None = None
    ) -> Tensor:
        k = max(counts, default=0)
        per_row = None
        if min(counts, default=k) < k:
            per_row = torch.tensor(counts, dtype=torch.int32, device=scores.device)
        sink = min(self.sink, k)  # a row shorter than what is forced keeps all it has
        window = min(self.window, k - sink)
        return topk(scores, k, sink=sink, window=window, counts=per_row, seq_start=seq_start, seq_end=seq_end)

    def raised(
        self, scores: Tensor, counts: Sequence[int], *, seq_start: Tensor | None = None, seq_end: Tensor | None = None
    ) -> Tensor:
        """The scores with +inf where an entry is kept whatever it has, and -inf where there is none."""
        return _raised(scores, self.sink, self.window, seq_start, seq_end)


@dataclass(frozen=True)
class TopKRecent:
    """`topk` per head where a share of the budget goes to the most recent entries, as a stage.

    Of the n entries that a row keeps, the last ``int(recent * n)`` stay whatever their score, then the largest scores; so
    the recent zone follows the budgets of rows and layers. A smaller n keeps a subset of what a larger one keeps.
    """

    recent: float

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise ValueError(f"TopKRecent: recent must be a share in [0, 1], got {self.recent}")

    @property
    def forced(self) -> int:
        return 0

    def __call__(
        self, scores: Tensor, counts: Sequence[int], *, seq_start: Tensor | None = None, seq_end: Tensor | None = None
    ) -> Tensor:
        forced = self.raised(scores, counts, seq_start=seq_start, seq_end=seq_end)
        return TopK()(forced, counts, seq_start=seq_start, seq_end=seq_end)

    def raised(
        self, scores: Tensor, counts: Sequence[int], *, seq_start: Tensor | None = None, seq_end: Tensor | None = None
    ) -> Tensor:
        """As `TopK.raised`. Heads of different counts share the recent zone of their row's mean."""
        recent = torch.tensor([int(self.recent * n) for n in counts], dtype=torch.int32, device=scores.device)
        return _raised(scores, 0, recent[:, None], seq_start, seq_end)


def _raised(
    scores: Tensor, sink: int, window: int | Tensor, seq_start: Tensor | None, seq_end: Tensor | None
) -> Tensor:
    """+inf at the first `sink` and the last `window` real entries of each row, -inf outside the real ones."""
    seq_len = scores.shape[2]
    if seq_start is None and seq_end is None and isinstance(window, int):
        raised = scores.clone()
        raised[:, :, :sink] = torch.inf
        raised[:, :, max(seq_len - window, 0) :] = torch.inf
        return raised
    column = torch.arange(seq_len, device=scores.device)
    start = 0 if seq_start is None else seq_start[:, None]
    end = seq_len if seq_end is None else seq_end[:, None]
    forced = (column < start + sink) | (column >= end - window)
    outside = (column < start) | (column >= end)
    shape = (-1, 1, seq_len)  # [batch, 1, seq_len], or one row for all
    return scores.masked_fill(forced.view(shape), torch.inf).masked_fill(outside.view(shape), -torch.inf)
