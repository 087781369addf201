"""StreamingLLM."""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress import budget, score, select
from kvcompress.methods import Method, register
from kvcompress.pipeline import Stages
from kvcompress.rotary import SinkRotation
from kvcompress.when import EveryStep, Prefill


@register("streaming_llm", title="StreamingLLM", paper="arXiv 2309.17453")
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keeps the first `n_sink` tokens and the last ``budget - n_sink``, numbered inside the cache; no scores, endless streams.

    After every forward a layer falls back to `budget` entries (attention saw the new tokens on top, as in the official
    loop), and the sinks are moved up to stand right before the window: the same logits as the official cache, which
    stores unrotated keys and rotates all of them at every step.

    Departures from mit-han-lab/streaming-llm@2e50426:
        - rotated keys are stored and only the sinks are rotated again (see `kvcompress.rotary.SinkRotation`). Needs rotary
          frequencies that do not depend on the position.
        - rows of a batch keep their own sinks (official: one slice for all, so left padding would become the sink).

    Attributes:
        budget: entries kept, sinks included.
        n_sink: first tokens, kept for ever.
        rolling: False cuts once at the end of the prefill and keeps the original positions, as KVCache-Factory, AdaKV
            and kvpress do under the same name.
    """

    n_sink: int = 4
    rolling: bool = True

    def stages(self) -> Stages:
        if isinstance(self.budget, int) and self.budget <= self.n_sink:
            raise ValueError(f"streaming_llm: budget must be more than the {self.n_sink} sinks, got {self.budget}")
        return Stages(
            score=score.Recency(),
            budget=budget.Uniform(self.budget),
            select=select.TopK(sink=self.n_sink),
            when=EveryStep() if self.rolling else Prefill(),
            attend=SinkRotation(self.n_sink) if self.rolling else None,
        )
