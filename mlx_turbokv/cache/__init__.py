"""The packed caches: drop-ins for mlx-lm's, for single sequences and batches."""

from . import speculation as speculation
from .base import STATE_VERSION, PackedCache
from .batch import BatchTurboKVCache
from .factory import CacheFactory, attach, detach, make_prompt_cache
from .indexed import IndexedTurboKVCache
from .rotating import TurboRotatingKVCache
from .rotating_batch import BatchTurboRotatingKVCache
from .rows import FLUSH_TOKENS
from .single import TurboKVCache

__all__ = [
    "FLUSH_TOKENS",
    "STATE_VERSION",
    "BatchTurboKVCache",
    "BatchTurboRotatingKVCache",
    "CacheFactory",
    "IndexedTurboKVCache",
    "PackedCache",
    "TurboKVCache",
    "TurboRotatingKVCache",
    "attach",
    "detach",
    "make_prompt_cache",
]
