"""The prompt cache: packed caches of finished requests."""

from __future__ import annotations

import argparse

from mlx_lm.models.cache import LRUPromptCache

from .options import NO_LIMIT


def make(options: argparse.Namespace) -> LRUPromptCache:
    """The server's prompt cache.

    Args:
        options: what ``options.parse`` read.
    """
    max_bytes = NO_LIMIT if options.prompt_cache_bytes is None else options.prompt_cache_bytes
    return LRUPromptCache(options.prompt_cache_size, max_bytes)
