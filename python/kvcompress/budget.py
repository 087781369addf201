"""Budgets: how many entries may each layer and each head keep?"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress import _check

__all__ = ["cosine_importance"]


def cosine_importance(
    before: Tensor, after: Tensor, *, seq_start: Tensor | None = None, is_update: bool = False
) -> Tensor:
    """Mean cosine similarity of the residual stream before and after a block, one number a sequence.

    ``out[b] = mean over real tokens s of <h, a> / (max(|h|, eps) * max(|a|, eps))``, ``eps = 1e-8``, with
    ``h = before[b, s]`` and ``a = after[b, s]``; near 1 means that the block barely turns the stream, so the
    layer needs little cache. SqueezeAttention (arXiv 2404.04793) splits the budget over the layers by it. Sums are
    float32 whatever the dtype (the official code stays in bfloat16, which cannot tell 0.985 from 0.989).

    Args:
        before: ``[batch, seq_len, hidden]`` float32, float16 or bfloat16; the stream that enters the block.
        after: same shape and dtype; the stream behind the block's residual add.
        seq_start: ``[batch]`` int32, first real token of each row (left padding); None: no padding.
        is_update: ``after`` holds the block's output instead, and the op forms ``before + after`` in registers, rounded
            to the dtype as the model rounds it: no second pass over the stream.

    Returns:
        ``[batch]`` float32 in [-1, 1]; NaN for a row without real tokens.

    Raises:
        ValueError, TypeError: ``cosine_importance: argument must be ..., got ...``.

    Scratch: ``4 * batch * ceil(seq_len / 64)`` bytes.

    Example:
        >>> h, attn_out = torch.randn(2, 128, 64), torch.randn(2, 128, 64)
        >>> kvcompress.cosine_importance(h, attn_out, is_update=True).shape
        torch.Size([2])
    """
    return _check.call(
        torch.ops.kvcompress.cosine_importance.default, before, after, seq_start, is_update
    )


@torch.library.register_fake("kvcompress::cosine_importance")
def _(before: Tensor, after: Tensor, seq_start: Tensor | None, is_update: bool) -> Tensor:
    op = "cosine_importance"
    _check.rank(op, "before", before, 3, "[batch, seq_len, hidden]")
    _check.rank(op, "after", after, 3, "[batch, seq_len, hidden]")
    _check.float_dtype(op, "before", before)
    _check.same_dtype(op, "after", after, before, "before")
    _check.same_device(op, "after", after, before, "before")
    must = f"of the shape of before {_check.shape_string(before)}"
    _check.require(after.shape == before.shape, op, "after", must, _check.shape_string(after))
    _check.last_contiguous(op, "before", before)
    _check.last_contiguous(op, "after", after)
    _check.row_vector(op, "seq_start", seq_start, before.shape[0], before, "before")
    return before.new_empty((before.shape[0],), dtype=torch.float32)
