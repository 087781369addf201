"""One decoding step as the model loop makes it, for the replays of methods that evict while decoding."""

from __future__ import annotations

from torch import Tensor

from kvcompress.cache import DenseStore
from kvcompress.layer import LayerState
from kvcompress.methods import Method
from kvcompress.pipeline import Pipeline


class Decoding:
    """A prompt of the first `length` tokens, then the others one by one.

    q, k, v: ``[batch, heads, length + steps, head_dim]``, after RoPE.
    """

    def __init__(self, method: Method, q: Tensor, k: Tensor, v: Tensor, length: int) -> None:
        self.q, self.k, self.v, self.next = q, k, v, length
        self.scale = q.shape[3] ** -0.5
        self.pipeline = Pipeline(method.stages(), 1)
        queries, keys, values = (x[:, :, :length] for x in (q, k, v))
        layer = LayerState(0, 1, queries, keys, values, [length] * q.shape[0], self.scale)
        self.store: DenseStore = self.pipeline.compress(layer)

    def append(self) -> None:
        """Room for the next token, and the token."""
        new = slice(self.next, self.next + 1)
        self.pipeline.make_room(self.store, 1)
        self.store.append(self.k[:, :, new], self.v[:, :, new])

    def attend(self) -> Tensor:
        """Its attention ``[batch, num_q_heads, head_dim]``."""
        new = slice(self.next, self.next + 1)
        self.next += 1
        return self.pipeline.attend(self.store, self.q[:, :, new], softmax_scale=self.scale)[:, :, 0]

    def step(self) -> Tensor:
        """A whole step."""
        self.append()
        out = self.attend()
        self.pipeline.evict(self.store)
        return out

    @property
    def kept(self) -> Tensor:
        """Positions ``[batch, heads, entries]``."""
        return self.store.positions[:, :, : self.store.max_length]
