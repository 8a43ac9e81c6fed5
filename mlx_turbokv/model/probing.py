"""Calls a model with one token to see what its layers store.

MLX is lazy: nothing is computed, so a model whose weights were never evaluated will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..log import log_failure
from .caches import Position, own_caches, put_cache
from .shapes import KVShape


class RecordingCache(KVCache):
    """Keeps the newest K and V it is given, as ``keys`` and ``values``.

    Args:
        offset: how many tokens it claims to hold.

    Attributes:
        is_read: whether somebody took K and V out of its state.
    """

    def __init__(self, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset
        self.is_read = False

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        self.offset += keys.shape[2]
        return keys, values

    def update_indexer(self, keys: mx.array, position_ids: mx.array) -> tuple[mx.array, mx.array]:
        """The keys of an indexer, for models that keep them in the same cache."""
        return keys, position_ids

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None]:
        """K and V, as the state of mlx-vlm's caches."""
        self.is_read = True
        return self.keys, self.values

    @property
    def shape(self) -> KVShape:
        """The shape of K and V."""
        keys, values = self.keys, self.values
        return KVShape(keys.shape[1], keys.shape[-1], values.shape[-1])


@contextmanager
def kept_as_it_is(model: nn.Module) -> Iterator[None]:
    """Take back what calls leave in a model: mlx-vlm's keep the positions of the last prompt."""
    before = [(module, dict(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, items, attributes in before:
            dict.clear(module)
            dict.update(module, items)
            vars(module).clear()
            vars(module).update(attributes)


def call_with_one_token(model: nn.Module, caches: list[Any]) -> None:
    """Call a model with one token; it stays as it is, and its caches hold what they were given.

    Raises:
        Exception: what the model raises: which, only it knows.
    """
    with kept_as_it_is(model):
        model(mx.zeros((1, 1), mx.int32), cache=caches)


def record_one_token(
    model: nn.Module, positions: Iterable[Position], offset: int = 0
) -> dict[Position, RecordingCache]:
    """Caches at these positions after one token; those that were given no K and V are left out.

    Empty for a model that cannot be called with tokens alone.
    """
    recording = {position: RecordingCache(offset) for position in positions}
    try:
        caches = own_caches(model)
        for (index, sub), cache in recording.items():
            put_cache(caches, index, sub, cache)
        call_with_one_token(model, caches)
    except Exception as error:  # what a model needs beyond tokens is known to its own loader alone
        log_failure(f"{type(model).__name__} cannot be called with tokens alone", error)
        return {}
    return {position: cache for position, cache in recording.items() if cache.keys is not None}


def after_one_token(model: nn.Module) -> list[Any] | None:
    """The model's own caches after one token, whose shapes say what its layers hold.

    None for a model that cannot be called with tokens alone.
    """
    try:
        caches = own_caches(model)
        call_with_one_token(model, caches)
    except Exception as error:  # what a model needs beyond tokens is known to its own loader alone
        log_failure(f"{type(model).__name__} cannot be called with tokens alone", error)
        return None
    return caches


def only_forwards_kv(model: nn.Module, caches: list[Any]) -> bool:
    """Whether a model passes the K and V of one token on to attention and does no more with them.

    Args:
        caches: new ones that return ``Handle``s; they are used up.
    """
    try:
        call_with_one_token(model, caches)
    except Exception as error:  # whatever a model or MLX raises where a handle is no array
        log_failure(f"{type(model).__name__} does more with K and V than attention", error)
        return False
    return True
