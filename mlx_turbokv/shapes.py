"""The shapes of a model's K and V, learnt without computing anything.

The model is called with one token through caches that write down what they are handed. MLX is
lazy: nothing is evaluated, so a model with random weights that were never made will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache

from .kv_layers import KVLayers, kv_layers, own_caches

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


def probe_shapes(model: nn.Module, layers: KVLayers | None = None) -> dict[Position, KVShape]:
    """Shapes of every KV layer, by (cache index, position in a CacheList or None).

    A model that cannot be called this way gives an empty answer: the probe is for early and better
    messages, and the caches check again when they see real rows.
    """
    try:
        caches = own_caches(model)
        layers = layers or kv_layers(model, caches)
        recording = {(x.index, x.sub): _RecordingCache() for x in layers.layers}
        for (index, sub), cache in recording.items():
            _put(caches, index, sub, cache)
        model(mx.zeros((1, 1), mx.int32), cache=caches)
    except Exception:  # a model may need what only its own loader or inputs bring
        return {}
    return {at: cache.shape for at, cache in recording.items() if cache.shape is not None}


def _put(caches: list[Any], index: int, sub: int | None, cache: Any) -> None:
    if sub is None:
        caches[index] = cache
        return
    holder: CacheList = caches[index]
    holder.caches = tuple(cache if i == sub else c for i, c in enumerate(holder.caches))
