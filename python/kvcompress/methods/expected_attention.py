"""Expected Attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress import budget, score, select
from kvcompress.layer import ALL_QUERIES, LayerState
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages


@register("expected_attention", title="Expected Attention", paper="arXiv 2510.00636")
@dataclass(frozen=True)
class ExpectedAttention(Method):
    """Keeps the keys that future queries are expected to attend to, weighted by the norm of their values.

    Before RoPE the queries of a head are taken as Gaussian, N(mu, Sigma), measured on the prompt. Rotated to the positions
    to come, on average R, a query's logit with key k is Gaussian too, so its exponential has the expectation
    ``exp(z)``, ``z = c k.R mu + c^2 k.(R Sigma R^T) k / 2`` with the softmax factor c. ``score(j) = (mean_h softmax_j z +
    epsilon) |v_j|``. The first `sink` entries are left out of all this and always stay. Once, at the end of a layer's prefill.

    Departures from NVIDIA/kvpress@8bb29b9 (ExpectedAttentionPress, the official code):
        - queries before RoPE are the cached dtype's rotated queries turned back, so in 16 bits they carry one more rounding.
        - sinks score +inf (official: the largest score of the batch plus 1); a share below `sink` entries is raised to it.
        - left padding counts in no statistic, and a row's own length decides its future positions.
        - the same number of entries for every head; the head budgets that the paper recommends are `adakv` with this as its
          `inner` (and an `epsilon` of 0.02, as there).

    Attributes:
        n_future: positions behind the prompt that the rotation is averaged over.
        sink: first entries, out of the statistics and always kept.
        covariance: False leaves out the second-order term.
        value_norm: False leaves out the norms of the values.
        epsilon: added to the expected attention before the norms weigh it (official with head budgets: 0.02).
    """

    n_future: int = 512
    sink: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def stages(self) -> Stages:
        return Stages(
            score=FutureAttention(self.n_future, self.sink, self.covariance, self.value_norm, self.epsilon),
            budget=budget.Uniform(self.budget),
            select=select.TopK(sink=self.sink),
        )


@dataclass(frozen=True)
class FutureAttention:
    """Attention that queries of the prompt's statistics would pay from the `n_future` positions behind it."""

    n_future: int
    sink: int
    covariance: bool
    value_norm: bool
    epsilon: float
    by_position = False
    is_mass = True
    queries = ALL_QUERIES

    def __post_init__(self) -> None:
        if self.n_future < 1:
            raise ValueError(f"expected_attention: n_future must be at least 1, got {self.n_future}")

    @score.row_by_row
    def __call__(self, layer: LayerState) -> Tensor:
        batch, heads, length, _ = layer.keys.shape
        scores = torch.full((batch, heads, length), torch.inf, dtype=torch.float32, device=layer.device)
        if length > self.sink:
            mean, covariance = self.future_queries(layer)
            keys, values = layer.keys[:, :, self.sink :], layer.values[:, :, self.sink :]
            attention = self._expected(keys, mean, covariance, layer.softmax_scale) + self.epsilon
            scores[:, :, self.sink :] = attention * score.row_norms(values) if self.value_norm else attention
        return scores

    def future_queries(self, layer: LayerState) -> tuple[Tensor, Tensor | None]:
        """Mean ``[batch, num_q_heads, head_dim]`` and covariance ``[..., head_dim]`` of a query behind the prompt."""
        mean, covariance = self._moments(layer)
        turn = _mean_rotation(score.frequencies(layer), layer.seq_len, self.n_future, mean.shape[-1])
        mean = mean @ turn.mT
        return mean, None if covariance is None else turn @ covariance @ turn.mT

    def _moments(self, layer: LayerState) -> tuple[Tensor, Tensor | None]:
        """Mean and biased covariance of the queries before RoPE, merged over chunks (Chan's update: nothing cancels)."""
        queries = layer.window(ALL_QUERIES)
        if queries.shape[2] != layer.seq_len:
            raise ValueError(
                f"expected_attention: queries must be those of the whole prompt ({layer.seq_len}), got {queries.shape[2]}"
            )
        mean = torch.zeros_like(queries[:, :, 0], dtype=torch.float32)
        squares = torch.zeros_like(mean[..., None] * mean[..., None, :]) if self.covariance else None
        for first in range(self.sink, layer.seq_len, score.CHUNK):
            part = score.before_rope(layer, queries[:, :, first : first + score.CHUNK], first)
            before, new = first - self.sink, part.shape[2]
            shift = part.mean(2) - mean
            if squares is not None:
                centred = part - part.mean(2, keepdim=True)
                between = shift[..., None] * shift[..., None, :] * (before * new / (before + new))
                squares += centred.mT @ centred + between
            mean += shift * (new / (before + new))
        return mean, None if squares is None else squares / (layer.seq_len - self.sink)

    def _expected(self, keys: Tensor, mean: Tensor, covariance: Tensor | None, scale: float) -> Tensor:
        """Softmax over the entries of the log of E exp(logit), mean over the query heads of a kv head."""
        group = (keys.shape[1], mean.shape[1] // keys.shape[1])
        mean = mean.unflatten(1, group)
        covariance = None if covariance is None else covariance.unflatten(1, group)

        def exponent(part: Tensor) -> Tensor:  # [batch, heads, n, head_dim] -> [batch, heads, n, q_per_kv]
            z = scale * (part @ mean.mT)
            if covariance is not None:  # a query head at a time: no [q_per_kv, n, head_dim] in between
                for i in range(group[1]):
                    z[..., i] += scale**2 / 2 * (part @ covariance[:, :, i] * part).sum(-1)
            return z

        return score.by_chunks(exponent, keys).softmax(2).mean(-1)

    def __str__(self) -> str:
        return f"attention expected from the next {self.n_future} positions"


def _mean_rotation(inv_freq: Tensor, first: int, count: int, head_dim: int) -> Tensor:
    """Mean of the rotations to positions ``first ... first + count - 1``, ``[head_dim, head_dim]`` float32."""
    positions = torch.arange(first, first + count, dtype=torch.float64, device=inv_freq.device)
    angle = positions[:, None] * inv_freq.double()
    cos, sin = angle.cos().mean(0), angle.sin().mean(0)
    turn = torch.eye(head_dim, dtype=torch.float64, device=inv_freq.device)
    half = torch.arange(len(inv_freq), device=inv_freq.device)
    other = half + len(inv_freq)
    turn[half, half], turn[other, other] = cos, cos
    turn[half, other], turn[other, half] = -sin, sin
    return turn.float()
