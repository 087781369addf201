"""Other libraries' way to do what our ops do. Each function gives a callable, or the reason why there is none here."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F


def _module(name: str) -> object:
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"cannot be imported: {error}"
    except Exception as error:  # a foreign package may fail in any way when it is loaded
        return f"cannot be imported: {type(error).__name__}: {error}"


def torch_window_scores(q: torch.Tensor, k: torch.Tensor, pool: str, kernel: int) -> torch.Tensor:
    """window_scores in eager torch without repeating K: materialises [B, Hkv, G * W, S]."""
    batch, heads, window, dim = q.shape
    length = k.shape[2]
    group = heads // k.shape[1]
    logits = q.reshape(batch, k.shape[1], group * window, dim) @ k.transpose(2, 3) * dim**-0.5
    rows = torch.arange(window, device=q.device).repeat(group)
    hidden = torch.arange(length, device=q.device) > length - window + rows[:, None]
    votes = logits.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    votes = votes.view(batch, k.shape[1], group, window, length).sum(3).mean(2)[..., : length - window]
    if pool == "avg":
        return F.avg_pool1d(votes, kernel, 1, kernel // 2)
    return F.max_pool1d(votes, kernel, 1, kernel // 2)


def compiled_window_scores() -> Callable[..., torch.Tensor]:
    """The same through torch.compile, one graph a shape."""
    return torch.compile(torch_window_scores, dynamic=False)


def kvpress_window_scores() -> Callable[..., torch.Tensor] | str:
    """SnapKV's scores of kvpress: its window attention and its pooling, without the projection and RoPE of its queries.

    kvpress computes the window's queries from hidden states; handed in ready, they cost it nothing here.
    """
    module = _module("kvpress.presses.snapkv_press")
    if isinstance(module, str):
        return module
    press = module.SnapKVPress
    rotary = importlib.import_module("kvpress.presses.snapkv_press")
    for name in ("get_prerope_query_states", "apply_rotary_pos_emb", "repeat_kv"):
        if not hasattr(rotary, name):
            return f"another version than known: kvpress.presses.snapkv_press has no {name}"

    class Layer(torch.nn.Module):
        def __init__(self, head_dim: int, groups: int):
            super().__init__()
            self.head_dim, self.num_key_value_groups = head_dim, groups

    def scores(q: torch.Tensor, k: torch.Tensor, pool: str, kernel: int) -> torch.Tensor:
        batch, heads, window, dim = q.shape
        if pool != "avg":
            raise ValueError(f"kvpress pools by avg only, got {pool}")
        groups = heads // k.shape[1]
        kept = {name: getattr(rotary, name) for name in ("get_prerope_query_states", "apply_rotary_pos_emb")}
        rotary.get_prerope_query_states = lambda *_: q
        rotary.apply_rotary_pos_emb = lambda x, *_: (x, None)
        try:
            frame = q.new_empty(batch, k.shape[2], 1)
            ones = q.new_empty(batch, k.shape[2], 1)
            attention = press.compute_window_attention(Layer(dim, groups), frame, k, window, (ones, ones))
        finally:
            for name, function in kept.items():
                setattr(rotary, name, function)
        votes = F.avg_pool1d(attention.mean(dim=-2), kernel_size=kernel, padding=kernel // 2, stride=1)
        return votes.view(batch, k.shape[1], groups, -1).mean(2)

    return scores


def flashinfer_topk() -> Callable[[torch.Tensor, int], object] | str:
    """flashinfer.top_k with ties to the smaller index; it does not order its output."""
    module = _module("flashinfer")
    if isinstance(module, str):
        return module
    return lambda scores, k: module.top_k(scores.flatten(0, 1), k)
