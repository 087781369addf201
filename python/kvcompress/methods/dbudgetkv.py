"""DBudgetKV, later named ReFreeKV."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress import score, select
from kvcompress.budget import Budget, Scores, Uniform, entries
from kvcompress.layer import ALL_QUERIES, LayerState
from kvcompress.methods import Method, inner_stages, register
from kvcompress.pipeline import Stages

_UNIT = 2.0**62  # fixed point of squares that sum to 1 at most: the same sums on every device, in any order


@dataclass(frozen=True)
class NormDrop(Budget):
    """Entries of a layer and row until the norm of the attention they receive is within `threshold` of that of all.

    With A_h the attention row of query head h over the candidates (the entries that the selection does not force), in the
    order of the scores, N(n) is the mean over the heads of the 2-norm of the first n entries of A_h; the row keeps the
    least n with ``N(all) - N(n) <= threshold * N(all)``. All heads keep as many. It waits for the device once a layer: the
    number of entries decides the size of the store.

    Attributes:
        threshold: share of the norm that may be lost, in [0, 1).
        budget: most entries (int) or share of the prompt (float); lower-ranked entries are no candidates.
        sink, window: entries that the selection forces at the front and at the end; they take no part in the norm.
        observed: A is the mean row of this share of the last prompt tokens; 0: the last token's row.
        causal: the observed rows see no later entries (the official code lets them).
    """

    threshold: float
    budget: int | float = 1.0
    sink: int = 0
    window: int = 0
    observed: float = 0.0
    causal: bool = True
    wants_lse = True

    def __post_init__(self) -> None:
        entries(self.budget, 1)
        if not 0 <= self.threshold < 1:
            raise ValueError(f"NormDrop: threshold must be in [0, 1), got {self.threshold}")
        if not 0 <= self.observed <= 1:
            raise ValueError(f"NormDrop: observed must be a share in [0, 1], got {self.observed}")

    @property
    def queries(self) -> int:
        return ALL_QUERIES if self.observed else 1

    def first(self, layer: LayerState, scores: Scores) -> list[int]:
        forced = self.sink + self.window
        most = [max(min(entries(self.budget, n), n) - forced, 0) for n in layer.lengths]
        attention = self._attention(layer)
        ranking = scores()
        ranking = ranking.repeat_interleave(attention.shape[1] // ranking.shape[1], 1)
        column = torch.arange(layer.seq_len, device=layer.device)
        lengths = torch.tensor(layer.lengths, device=layer.device)[:, None]
        candidate = (column >= layer.seq_len - lengths + self.sink) & (column < layer.seq_len - self.window)

        # best first; what is no candidate comes last and weighs nothing
        order = ranking.masked_fill(~candidate[:, None], -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        allowed = torch.tensor(most, device=layer.device)[:, None, None]
        power = attention.masked_fill(~candidate[:, None], 0).double().square().gather(-1, order)
        power = power.masked_fill(column >= allowed, 0)
        norms = (power * _UNIT).round().long().cumsum(-1).double().sqrt().mean(1)  # [batch, seq_len]
        full = norms[:, -1:]
        needed = 1 + (full - norms > self.threshold * full).sum(-1)
        return [min(n, limit) + forced for n, limit in zip(needed.tolist(), most)]

    def _attention(self, layer: LayerState) -> Tensor:
        """The reference row of each query head, ``[batch, num_q_heads, seq_len]`` float32, 0 or -inf at padding."""
        if not self.observed:
            return score.ReceivedAttention(queries=1, group_reduce="none")(layer)
        batch, num_q_heads = layer.keys.shape[0], layer.window(1).shape[1]
        rows = layer.keys.new_zeros((batch, num_q_heads, layer.seq_len), dtype=torch.float32)
        for row, length in enumerate(layer.lengths):
            if length == 0:
                continue
            observed = max(int(length * self.observed), 1)
            keys, lse = layer.keys[row : row + 1, :, -length:], layer.window_lse(observed)
            rows[row : row + 1, :, -length:] = score.window_scores(
                layer.window(observed)[row : row + 1],
                keys,
                lse=lse[row : row + 1] if lse is not None and self.causal else None,
                first_query=length - observed if self.causal else length,  # from beyond the prompt all keys are seen
                num_scored=length,
                window_reduce="mean",
                group_reduce="none",
                softmax_scale=layer.softmax_scale,
            )
        return rows


@register("dbudgetkv", title="DBudgetKV", paper="arXiv 2502.16886")
@dataclass(frozen=True)
class DBudgetKV(Method):
    """No budget: each layer drops its least important entries while the norm of the attention loses at most `threshold`.

    The order is the position by default: the first `sink` entries stay, then the oldest go first. N(n) is the mean over
    the query heads of the 2-norm of the last prompt token's attention to the n entries that rank highest, sinks left
    out; a layer keeps the least n with ``N(all) - N(n) <= threshold * N(all)``. Layers and rows keep different numbers.

    Departures from Patrick-Ni/ReFreeKV@cc68486:
        - the paper's order and threshold (official script: attention of the last 8 tokens, 0.05). The script's order is
          ``inner=create("snapkv", budget=1.0, window=8, pool="none", group_reduce="none")``.
        - rows of a batch keep what they keep alone (official: cut to the shortest, which drops the newest tokens).
        - observed rows are causal; ``causal=False`` is official.
        - the metrics on the full map of attention (``norm-fro`` and others) are not offered: they need it in memory.

    Attributes:
        budget: most entries a layer keeps; 1.0: no bound but the prompt.
        threshold: share of the norm that may be lost.
        inner: a method whose order of entries, and whose forced ones, take the place of the position.
        sink: first entries that are always kept, in the order by position.
        observed: share of the last prompt tokens whose mean attention row is looked at; 0: the last token's.
        causal: see above.
    """

    budget: int | float = 1.0
    threshold: float = 0.01
    inner: Method | str | None = None
    sink: int = 4
    observed: float = 0.0
    causal: bool = True

    def stages(self) -> Stages:
        if self.inner is None:
            stages = Stages(score=score.Recency(), budget=Uniform(self.budget), select=select.TopK(sink=self.sink))
        else:
            stages = inner_stages(self.name, self.inner, self.budget)
        keep = stages.select
        if not isinstance(keep, select.TopK):
            raise ValueError(f"dbudgetkv: inner must force a fixed number of entries, got {type(keep).__name__}")
        drop = NormDrop(
            self.threshold, self.budget, sink=keep.sink, window=keep.window, observed=self.observed, causal=self.causal
        )
        return replace(stages, budget=drop)
