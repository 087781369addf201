"""kvcompress: compress the KV cache of transformer LLMs, in fused CUDA kernels with CPU twins."""

from __future__ import annotations

from kvcompress import _library

_library.load()

from kvcompress._debug import set_debug  # noqa: E402
from kvcompress.budget import cosine_importance, mass_count  # noqa: E402
from kvcompress.columns import column_sums  # noqa: E402
from kvcompress.decode import decode_attention, ragged_decode_attention  # noqa: E402
from kvcompress.evict import evict_append_, history_scores, ragged_evict_append_  # noqa: E402
from kvcompress.observed import observed_decode_attention_, observed_ragged_decode_attention_  # noqa: E402
from kvcompress.score import window_scores  # noqa: E402
from kvcompress.select import head_counts, topk, topk_ragged  # noqa: E402
from kvcompress.store import append_, compact_, compact_ragged_, gather, gather_ragged  # noqa: E402
from kvcompress.terms import output_terms_  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "append_",
    "column_sums",
    "compact_",
    "compact_ragged_",
    "cosine_importance",
    "decode_attention",
    "evict_append_",
    "gather",
    "gather_ragged",
    "head_counts",
    "history_scores",
    "mass_count",
    "observed_decode_attention_",
    "observed_ragged_decode_attention_",
    "output_terms_",
    "ragged_decode_attention",
    "ragged_evict_append_",
    "set_debug",
    "topk",
    "topk_ragged",
    "window_scores",
]


def __getattr__(name: str) -> object:
    if name == "_C":  # per CPython version, and needed for build facts and host planners only
        import importlib

        try:
            return importlib.import_module("kvcompress._C")
        except ImportError as error:
            raise ImportError(
                f"kvcompress._C is missing for this Python ({error}); the ops work without it, `kvcompress doctor` and "
                "the host planners do not. Build it with `pip install --no-build-isolation .`"
            ) from error
    raise AttributeError(f"module 'kvcompress' has no attribute {name!r}")
