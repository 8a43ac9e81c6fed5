"""What a model's K and V are and what it does with them, learnt without computing anything.

The model is called with one token through caches that write down what they are handed. MLX is
lazy: nothing is evaluated, so a model with random weights that were never made will do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache

Position = tuple[int, "int | None"]


@dataclass(frozen=True)
class KVShape:
    """What one KV layer stores for a token."""

    n_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    @property
    def n_values(self) -> int:
        """Values of K and V a token."""
        return self.n_kv_heads * (self.k_head_dim + self.v_head_dim)


class _RecordingCache(KVCache):
    def __init__(self) -> None:
        super().__init__()
        self.shape: KVShape | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.shape = KVShape(keys.shape[1], keys.shape[-1], values.shape[-1])
        return super().update_and_fetch(keys, values)


def own_caches(model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    """Caches from the model's own factory, whatever is attached to the instance."""
    attached = vars(model).get("make_cache")
    while hasattr(attached, "turbokv_previous"):
        attached = attached.turbokv_previous
    if attached is not None:
        return attached(*args, **kwargs)
    if hasattr(type(model), "make_cache"):
        return type(model).make_cache(model, *args, **kwargs)
    return [KVCache() for _ in model.layers]


def probe_shapes(model: nn.Module, positions: Iterable[Position]) -> dict[Position, KVShape]:
    """Shapes of the KV layers at ``positions``: (cache index, position in a CacheList or None).

    A layer that stores nothing of its own is missing from the answer. A model that cannot be
    called this way gives an empty one.
    """
    recording = {position: _RecordingCache() for position in positions}
    try:
        caches = own_caches(model)
        for (index, sub), cache in recording.items():
            put_cache(caches, index, sub, cache)
        model(mx.zeros((1, 1), mx.int32), cache=caches)
    except Exception:  # what a model needs beyond tokens is known to its own loader alone
        return {}
    return {at: cache.shape for at, cache in recording.items() if cache.shape is not None}


def hands_over(model: nn.Module, caches: list[Any]) -> bool:
    """Whether a model passes the K and V of one token on to attention and does no more with them.

    Args:
        caches: fresh ones that answer with handles; they are used up.
    """
    try:
        model(mx.zeros((1, 1), mx.int32), cache=caches)
    except Exception:  # whatever a model or MLX raises where a handle is no array
        return False
    return True


def put_cache(caches: list[Any], index: int, sub: int | None, cache: Any) -> None:
    """Put a cache in a list of caches, or in the CacheList at ``index``."""
    if sub is None:
        caches[index] = cache
        return
    holder: CacheList = caches[index]
    holder.caches = tuple(cache if i == sub else c for i, c in enumerate(holder.caches))
