"""The two functions that transformers calls: the attention "kvcompress" and its mask."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvcompress.models.rows import rows_of

if TYPE_CHECKING:
    from kvcompress.models.attach import Attachment
    from kvcompress.models.cache import CompressedCache

__all__ = ["BOUND", "NAME", "attachments", "expect"]

NAME = "kvcompress"
BOUND = "_kvcompress_fixed"  # the fixed layer of a module, as a plain attribute, which a compiler can follow

attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()  # by attention module

_expected = threading.local()

# What an attention layer may ask for that the stored entries are not attended with. Anything else a model passes along is
# advice for other backends (position_ids, cache positions, output flags).
_REFUSED = {
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks (learned logits)",
    "position_bias": "a position bias",
    "sliding_window": "a sliding window on a full-attention layer",
}


def expect(cache: CompressedCache, layer_idx: int, key: Tensor) -> None:
    """The next attention over exactly this key tensor belongs to that layer of that cache."""
    _expected.layer = (weakref.ref(cache), layer_idx, weakref.ref(key))


def _expected_layer(module: nn.Module, key: Tensor) -> tuple[CompressedCache, int] | None:
    found = getattr(_expected, "layer", None)
    if found is None:
        return None
    cache, layer_idx = found[0](), found[1]
    if found[2]() is not key:
        if cache is not None and cache.waits_for(layer_idx) and getattr(module, "layer_idx", None) == layer_idx:
            raise NotImplementedError(
                f"kvcompress: {type(module).__name__} attends over other keys than it gives the cache (latent attention), which is "
                "not supported"
            )
        return None
    _expected.layer = None
    return None if cache is None else (cache, layer_idx)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a compressed layer; over anything else (other caches, sliding layers) what "sdpa" does."""
    fixed = getattr(module, BOUND, None)
    if fixed is not None and fixed.pending is not None and fixed.pending[0] is key:
        slides = {"sliding_window"} if fixed.is_sliding else set()  # its store holds no more than the window
        _refuse(module, dropout, kwargs, allowed=slides)
        return fixed.attend(query, scaling or query.shape[-1] ** -0.5).transpose(1, 2).contiguous(), None
    found = _expected_layer(module, key)
    if found is None:
        _refuse(module, 0.0, {"softcap": kwargs.get("softcap")})  # "sdpa" cannot either
        mask = _mask_4d(module, query, key, attention_mask, kwargs)
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    _refuse(module, dropout, kwargs)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            "kvcompress: attention_mask must be a 2-D padding mask [batch, tokens so far] or None, got a custom "
            f"{attention_mask.dim()}-D mask"
        )
    cache, layer_idx = found
    rows = None if attention_mask is None else rows_of(attention_mask, query.shape[2])
    out = cache.attend(layer_idx, query, rows, scaling or query.shape[-1] ** -0.5, attachments.get(module))
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any], allowed: Set[str] = frozenset()) -> None:
    """What the stored entries cannot be attended with."""
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and name not in allowed:
            raise NotImplementedError(
                f"kvcompress: {type(module).__name__} attends with {what}, which is not supported"
            )
    if dropout:
        raise NotImplementedError("kvcompress: attention dropout is not supported; call model.eval() first")
    if kwargs.get("is_causal") is False:
        raise NotImplementedError(f"kvcompress: {type(module).__name__} is not causal, which is not supported")


def _mask_4d(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """What `sdpa` wants in place of our 2-D mask (or of None, which it takes for an upper-left causal mask)."""
    if kwargs.get("cache") is not None:
        raise NotImplementedError("kvcompress: continuous batching is not supported; detach the model first")
    num_queries, seq_len = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
    hides_future = mask is None and causal and 1 < num_queries < seq_len
    if not hides_future and (mask is None or mask.dim() != 2):
        return mask
    return sdpa_mask(
        query.shape[0],
        num_queries,
        seq_len,
        q_offset=seq_len - num_queries,
        attention_mask=mask,
        allow_is_causal_skip=False,
        device=query.device,
    )


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask as it is (None if nothing is padded); each layer makes its own bounds of it.

    One causal mask cannot fit all layers: they hold different numbers of entries. Sliding windows, chunks, overlays and static
    caches get `sdpa`'s mask.
    """
    if isinstance(q_offset, Tensor) and kv_length == q_length:
        return None  # a fixed cache: its store bounds the attention, and no step depends on a number of the host
    plain = local_size is None and mask_function is causal_mask_function and not isinstance(q_offset, Tensor)
    if not plain or kv_offset + kv_length != q_offset + q_length:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
    if attention_mask is None or torch.compiler.is_compiling() or rows_of(attention_mask, q_length).is_full:
        return attention_mask if torch.compiler.is_compiling() else None
    return attention_mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
