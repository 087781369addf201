"""LayerState: the one record that travels through the stages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["ALL_QUERIES", "LayerState"]

ALL_QUERIES = 2**62  # a score that looks at the queries of the whole prompt


@dataclass
class LayerState:
    """A layer at the moment it is compressed: everything a score, a budget or a selection may look at.

    Attributes:
        index: which of the compressed layers, from 0.
        num_layers: how many layers are compressed.
        queries: ``[batch, num_q_heads, n, head_dim]``, the last n prompt queries after RoPE; n is at least what the
            score asked for, or the whole prompt if that is shorter.
        keys, values: ``[batch, num_kv_heads, seq_len, head_dim]``, keys after RoPE.
        lengths: real entries of each row, on the host; row b's are the last ``lengths[b]``.
        softmax_scale: factor of the logits.
        seq_start: ``[batch]`` int32 on the device, first real entry of each row; None: no row is padded.
        lse: ``[batch, num_q_heads, n]`` float32 log-sum-exp of the same queries, where a stage wants it (`wants_lse`) and the
            prompt's own attention returned it; None: whoever needs it makes it again, in one more pass over K.
        output: like `queries`, what the attention of the layer gave them, before the output projection; None: the model loop
            does not have it.
        inv_freq: ``[rotary_dim / 2]`` float32 rotary frequencies of the model, for scores that take a rotation back; None: the
            model loop does not know them. Row b's entry j was rotated to position ``j - seq_start[b]``.
        lookahead: ``[batch, num_q_heads, n, head_dim]`` queries of a draft that goes on behind the prompt, after RoPE; None: no draft.
        lookahead_lengths: how many of them are row b's, the first ones.
    """

    index: int
    num_layers: int
    queries: Tensor | None
    keys: Tensor
    values: Tensor
    lengths: list[int]
    softmax_scale: float
    seq_start: Tensor | None = None
    lse: Tensor | None = None
    output: Tensor | None = None
    inv_freq: Tensor | None = None
    lookahead: Tensor | None = None
    lookahead_lengths: list[int] = field(default_factory=list)

    @property
    def seq_len(self) -> int:
        return self.keys.shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def window(self, size: int) -> Tensor:
        """The last `size` queries, or fewer if the prompt is shorter."""
        if self.queries is None:
            raise ValueError("LayerState: queries must be given for a score that looks at queries, got None")
        return self.queries[:, :, -size:]

    def window_lse(self, size: int) -> Tensor | None:
        """The log-sum-exp of the same queries, where it is known."""
        return None if self.lse is None else self.lse[:, :, -size:]

    def window_output(self, size: int) -> Tensor | None:
        """What attention gave the same queries, where it is known."""
        return None if self.output is None else self.output[:, :, -size:]

    def drafted(self) -> Tensor:
        """The queries of the draft, whose rows all drafted as many tokens."""
        if self.lookahead is None:
            raise RuntimeError(
                "LayerState: lookahead queries must be there at the cut: the model looks ahead when it decodes the first token "
                "inside `with kvcompress.models.attach(model):`; the prompt cannot be cut before"
            )
        return self.lookahead[:, :, : self.lookahead_lengths[0]]

    def row(self, b: int) -> LayerState:
        """Row b as a batch of its own, without its padding; views, nothing is copied."""
        start = self.seq_len - self.lengths[b]

        def cut(t: Tensor | None) -> Tensor | None:  # the last `lengths[b]` queries, or all there are
            return None if t is None else t[b : b + 1, :, max(0, t.shape[2] - self.lengths[b]) :]

        return replace(
            self,
            queries=cut(self.queries),
            keys=self.keys[b : b + 1, :, start:],
            values=self.values[b : b + 1, :, start:],
            lengths=[self.lengths[b]],
            seq_start=None,
            lse=cut(self.lse),
            output=cut(self.output),
            lookahead=None if self.lookahead is None else self.lookahead[b : b + 1],
            lookahead_lengths=self.lookahead_lengths[b : b + 1],
        )
