"""Copies of caches that cannot be trimmed: a conversation can go back to where they were made.

Recurrent states and windows hold the newest tokens alone. Caches that grow are trimmed instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from ..model.caches import Position, put_cache
from .single import TurboKVCache
from .summary import PACKED


@dataclass
class Checkpoint:
    """What caches held after their first tokens.

    Args:
        n_tokens: how many.
        leaves: copies of the caches that cannot be trimmed, in the model's order.
    """

    n_tokens: int
    leaves: list[Any]


def positions(caches: list[Any]) -> Iterator[tuple[Position, Any]]:
    """Every cache with its position, CacheLists opened."""
    for index, cache in enumerate(caches):
        if isinstance(cache, CacheList):
            yield from (((index, sub), leaf) for sub, leaf in enumerate(cache.caches))
        else:
            yield (index, None), cache


def always_trims(cache: Any) -> bool:
    """Whether any number of tokens can be taken off the end, whatever was written."""
    return type(cache) is KVCache or isinstance(cache, TurboKVCache)


def take(caches: list[Any], n_tokens: int) -> Checkpoint | None:
    """Copy what cannot be trimmed; None where everything can be.

    Args:
        n_tokens: tokens that the caches hold.
    """
    held = [leaf for _, leaf in positions(caches) if not always_trims(leaf)]
    return Checkpoint(n_tokens, copy.deepcopy(held)) if held else None


def restore(caches: list[Any], checkpoint: Checkpoint) -> None:
    """Take caches back to a checkpoint, which stays as it is."""
    copies = iter(copy.deepcopy(checkpoint.leaves))
    for (index, sub), leaf in list(positions(caches)):
        if always_trims(leaf):
            leaf.trim(leaf.offset - checkpoint.n_tokens)
        else:
            put_cache(caches, index, sub, next(copies))


def emptied(caches: list[Any], fresh: list[Any]) -> list[Any]:
    """Empty caches of the same formats and windows.

    Args:
        fresh: new caches of the model, which are used up.
    """
    news = [leaf for _, leaf in positions(fresh)]
    for ((index, sub), held), new in zip(list(positions(caches)), news):
        put_cache(fresh, index, sub, _emptied(held, new))
    return fresh


def _emptied(held: Any, new: Any) -> Any:
    if isinstance(held, PACKED):
        empty = copy.copy(held)
        empty._clear()
        return empty
    if type(held) is RotatingKVCache:
        return RotatingKVCache(held.max_size, held.keep)
    return KVCache() if type(held) is KVCache else new
