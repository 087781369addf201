"""Attaching to model loops: Hugging Face transformers. The only room that imports it.

cache = CompressedCache(model.config, methods.create("snapkv", budget=0.1))
with attach(model):
    model.generate(**inputs, past_key_values=cache)
print(cache.stats())
"""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"kvcompress.models needs Hugging Face transformers ({error}); install it with `pip install 'kvcompress[hf]'`"
    ) from error

from kvcompress.models.attach import Attachment, attach
from kvcompress.models.cache import CompressedCache, cache_argument
from kvcompress.models.fixed import FixedCache
from kvcompress.models.stats import CacheStats, LayerStats

__all__ = ["Attachment", "CacheStats", "CompressedCache", "FixedCache", "LayerStats", "attach", "cache_argument"]
