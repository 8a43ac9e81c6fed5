"""BatchIndexedTurboKVCache: packed K and V of a batch of sequences, with the keys of an indexer.

mlx-vlm must be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..quant.layout import KVLayout
from .base import loadable
from .batch import BatchTurboKVCache
from .indexed import Indexed, IndexedTurboKVCache, IndexRows, joined

_OwnBatch: Any = importlib.import_module("mlx_vlm.models.qwen4_exp.language").BatchQSAKVCache


@loadable
class BatchIndexedTurboKVCache(Indexed, BatchTurboKVCache, _OwnBatch):
    """A packed KV cache for one layer and several sequences, with the keys of an indexer.

    The model asks whether its batch is a ``BatchQSAKVCache``; nothing of that is used.

    Takes what ``BatchTurboKVCache`` takes.
    """

    single_class = IndexedTurboKVCache
    memory_profile = None  # as PrefixCached says

    def extract(self, idx: int) -> IndexedTurboKVCache:
        cache: Any = super().extract(idx)
        if not cache.empty() and self.index_rows is not None:
            rows = self.index_rows.of_sequences(mx.array([idx]))
            rows = rows.taken(self._left_padding[idx], self.n_rows)
            cache.index_rows = IndexRows(*map(mx.contiguous, rows))
            mx.async_eval(*cache.index_rows)
        return cache

    def _take_sequences(self, rows: mx.array, indices: list[int]) -> None:
        super()._take_sequences(rows, indices)
        self.clear_index_blocks()
        if self.index_rows is not None:
            self.index_rows = self.index_rows.of_sequences(rows)

    def _move(self, shifts: list[int], ends: list[int], n: int) -> None:
        super()._move(shifts, ends, n)
        self.clear_index_blocks()
        if self.index_rows is not None:
            self.index_rows = self.index_rows.moved(shifts, n)

    def _hold_newest(self, caches: Sequence[Any], n: int, layout: KVLayout | None) -> None:
        held = [cache.index_rows for cache in caches if cache.index_rows is not None]
        parts = []
        for cache in caches if held else ():
            batch_size = getattr(cache, "batch_size", 1)
            rows, like = cache.index_rows, held[0]
            if rows is None:  # its n rows are padding
                keys = mx.zeros((batch_size, 1, like.keys.shape[-1]), like.keys.dtype)
                rows = IndexRows(keys, mx.zeros((batch_size, 1), like.positions.dtype))
            parts.append(rows.moved([n - cache.n_rows] * batch_size, n))
        super()._hold_newest(caches, n, layout)
        self.clear_index_blocks()
        self.index_rows = joined(parts, True) if parts else None


IndexedTurboKVCache.batch_class = BatchIndexedTurboKVCache
