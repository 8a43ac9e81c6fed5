"""The queries that meet the keys of a cache, as ``mx.fast.scaled_dot_product_attention`` is given
them: nearly all mlx-lm models go through it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

_lock = threading.RLock()


@contextmanager
def watched_queries(caches: Sequence[Any], seen: Callable[[int, mx.array], None]) -> Iterator[None]:
    """Call ``seen`` with a cache's index and the queries, where attention is given its very keys.

    Of this thread alone; one thread at a time replaces MLX's function.

    Args:
        caches: whose ``update_and_fetch`` is watched for as long as this lasts.
    """
    with _lock:
        attention, thread = mx.fast.scaled_dot_product_attention, threading.get_ident()
        returned: dict[int, mx.array] = {}

        def watch(index: int, update: Callable) -> Callable:
            def update_and_fetch(*args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
                keys, values = update(*args, **kwargs)
                returned[index] = keys
                return keys, values

            return update_and_fetch

        def attend(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
            if threading.get_ident() == thread:
                for index, keys in returned.items():
                    if k is keys:
                        seen(index, q)
            return attention(q, k, v, **options)

        for index, cache in enumerate(caches):
            cache.update_and_fetch = watch(index, cache.update_and_fetch)
        mx.fast.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            mx.fast.scaled_dot_product_attention = attention
            for cache in caches:
                del cache.update_and_fetch
