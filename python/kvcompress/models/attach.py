"""attach: makes a transformers model attend through kvcompress, and hands the cache what it asks of the model."""

from __future__ import annotations

import sys
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.models import attention
from kvcompress.models.cache import CompressedCache
from kvcompress.models.lookahead import look_ahead

if TYPE_CHECKING:
    from kvcompress.models.fixed import FixedLayer

__all__ = ["Attachment", "attach"]

# Rotary embeddings whose frequencies do not change with the length, so that a stored key can be moved.
_FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}

_attached: weakref.WeakKeyDictionary[PreTrainedModel, Attachment] = weakref.WeakKeyDictionary()


def attach(model: PreTrainedModel) -> Attachment:
    """Sends the attention of `model` through kvcompress until the context ends, or until `detach()`.

    Sets the attention implementation "kvcompress", which attends over a `CompressedCache` and does what "sdpa" does with any
    other cache, and puts hooks on the decoder layers (they do nothing unless a method asks for the residual stream). While
    anything is attached, cuDNN attention is off: it plans anew for every cache length, 20 to 60 ms a token.

    Raises:
        ValueError: a model that does not take registered attention functions.

    Example:
        >>> with attach(model):
        ...     model.generate(**inputs, past_key_values=CompressedCache(model.config, method))
    """
    held = _attached.get(model)
    if held is None:
        held = Attachment(model)
    held._depth += 1
    return held


class Attachment:
    """A model that is attached; a context manager. Nested attachments of one model are the same."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._depth = 0
        self._stream = threading.local()
        self._handles: list[Any] = []
        self._measured: set[int] = set()  # layers whose residual stream the hooks see
        self._rotary = _rotary_of(model)
        self._previous = _implementations(model)
        model.set_attn_implementation(attention.NAME)
        text = model.config.get_text_config(decoder=True)
        if text._attn_implementation != attention.NAME:
            raise ValueError(
                f"attach: model must take registered attention functions (AttentionInterface), got {type(model).__name__}"
            )
        for module in model.modules():
            inner = _attention_of(module)
            if inner is not None:
                self._hook(module, inner)
        self._handles.append(model.register_forward_pre_hook(self._draft, with_kwargs=True))
        attention.attachments.update(dict.fromkeys(self._modules(model), self))
        _attached[model] = self
        _Cudnn.off()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Restores the model. The cache can be used again once the model is attached again."""
        self._depth -= 1
        if self._depth != 0:
            return
        _Cudnn.restore()
        for handle in self._handles:
            handle.remove()
        model = self._model()
        if model is None:
            return
        for module in self._modules(model):
            attention.attachments.pop(module, None)
            module.__dict__.pop(attention.BOUND, None)
        _attached.pop(model, None)
        model.set_attn_implementation(self._previous)

    def bind(self, layer_idx: int, fixed: FixedLayer) -> None:
        """The attention of a layer goes to `fixed` whenever that waits for it."""
        model = self._model()
        assert model is not None
        for module in self._modules(model):
            if module.layer_idx == layer_idx:
                module.__dict__[attention.BOUND] = fixed

    @staticmethod
    def _modules(model: PreTrainedModel) -> list[nn.Module]:
        return [module for module in model.modules() if hasattr(module, "layer_idx")]

    def _draft(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first token is decoded: the draft of a method that looks ahead."""
        if torch.compiler.is_compiling():
            return
        for name in ("past_key_values", "cache"):
            cache = kwargs.get(name)
            if isinstance(cache, CompressedCache) and cache.lookahead is not None:
                inputs = {**kwargs, "input_ids": args[0]} if args else kwargs
                tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
                if tokens is not None and cache.wants_draft(tokens.shape[1]):
                    look_ahead(model, cache, inputs, name)

    # --- the residual stream

    def _hook(self, block: Any, inner: Any) -> None:
        """Watches what enters the decoder layer and what its attention adds to it."""
        layer_idx: int = inner.layer_idx
        # Gemma and OLMo normalise the attention's output before it is added; elsewhere that name means the norm behind the sum
        sandwich = hasattr(block, "pre_feedforward_layernorm") or hasattr(block, "post_feedforward_layernorm")
        last = block.post_attention_layernorm if sandwich and hasattr(block, "post_attention_layernorm") else inner
        factor = getattr(block, "residual_multiplier", 1.0)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return  # a decode step: nothing is measured
            # its name differs with the model, and changed in transformers 5.24
            cache = next((given for given in kwargs.values() if isinstance(given, CompressedCache)), None)
            self._stream.open = None
            if cache is not None and cache.wants_residual(layer_idx):
                hidden: Tensor = args[0] if args else kwargs["hidden_states"]
                self._stream.open = (cache, hidden.detach())

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch.compiler.is_compiling():
                return
            opened = getattr(self._stream, "open", None)
            if opened is None:
                return
            self._stream.open = None
            update = output[0] if isinstance(output, tuple) else output
            cache, hidden = opened
            cache.observe(layer_idx, hidden, update.detach() if factor == 1.0 else update.detach() * factor)

        self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(last.register_forward_hook(after))
        self._measured.add(layer_idx)

    def require_residual(self, layer_idx: int) -> None:
        """Raises where the hooks cannot see the stream around a layer's attention."""
        if layer_idx not in self._measured:
            raise NotImplementedError(
                f"attach: this method measures the residual stream, and layer {layer_idx} of "
                f"{type(self._model()).__name__} has no decoder layer with a `self_attn` that could be watched"
            )

    # --- rotary positions

    @property
    def inv_freq(self) -> Tensor | None:
        """Rotary frequencies of the full-attention layers, ``[rotary_dim / 2]`` float32; None where they are not fixed."""
        return self._rotary[0]

    def require_fixed_rotation(self) -> None:
        """Raises where stored keys cannot be moved to other positions."""
        if self._rotary[0] is None:
            raise NotImplementedError(
                f"attach: this method moves keys to other positions, which {type(self._model()).__name__} does not allow: "
                f"{self._rotary[1]}"
            )


def _attention_of(block: nn.Module) -> nn.Module | None:
    """The self-attention of a decoder layer; None for any other module."""
    for name, child in block.named_children():
        if hasattr(child, "layer_idx") and "attn" in name.replace("attention", "attn") and "cross" not in name:
            return child
    return None


def _rotary_of(model: PreTrainedModel) -> tuple[Tensor | None, str]:
    """The rotary frequencies if keys can be moved by them, or why they cannot."""
    for module in model.modules():
        for name in ("full_attention_inv_freq", "inv_freq"):
            inv_freq = getattr(module, name, None)
            if not isinstance(inv_freq, Tensor):
                continue
            kind = getattr(module, "rope_type", "default")
            kind = kind.get("full_attention", "default") if isinstance(kind, dict) else kind
            if kind not in _FIXED_ROPE:
                return None, f"its rotary frequencies ({kind}) change with the length"
            rotate_half = getattr(sys.modules.get(type(module).__module__), "rotate_half", None)
            if rotate_half is not None and rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
                return None, "its rotary pairs are interleaved"
            return inv_freq, ""
    return None, "it has no rotary embedding"


def _implementations(model: PreTrainedModel) -> str | dict[str, str]:
    """The attention implementations as `set_attn_implementation` takes them back."""
    config: Any = model.config
    parts: dict[str, Any] = {name: getattr(config, name, None) for name in config.sub_configs}
    parts = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **parts} if parts else config._attn_implementation


class _Cudnn:
    """torch's switch for cuDNN attention is global: off from the first attachment to the last."""

    depth = 0
    previous = True

    @classmethod
    def off(cls) -> None:
        if cls.depth == 0:
            cls.previous = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        cls.depth += 1

    @classmethod
    def restore(cls) -> None:
        cls.depth -= 1
        if cls.depth == 0:
            torch.backends.cuda.enable_cudnn_sdp(cls.previous)
