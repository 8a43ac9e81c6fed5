"""Rows of mlx-lm's own caches, packed; and packed rows, as mlx-lm's own cache has them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from ..errors import InputError, short
from .rotating import TurboRotatingKVCache
from .single import TurboKVCache

STEP = 2048  # rows that are packed at a time
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def dequantized(cache: Any) -> Any:
    """A ``QuantizedKVCache`` as a ``KVCache`` of the same rows; any other cache as it is.

    Raises:
        ValueError: its arrays are no quantised rows.
    """
    if isinstance(cache, CacheList):
        return CacheList(*map(dequantized, cache.caches))
    if type(cache) is not QuantizedKVCache:
        return cache
    bits, group = cache.bits, cache.group_size
    if type(bits) is not int or bits not in _BITS or type(group) is not int or group not in _GROUPS:
        raise ValueError(f"it is quantised with {short(bits)} bits for {short(group)} values")
    plain = KVCache()
    plain.keys, plain.values = (_dequantized(x, group, bits) for x in (cache.keys, cache.values))
    plain.offset = cache.offset
    return plain


def _dequantized(rows: Any, group: int, bits: int) -> mx.array:
    """Rows of [B, H, T, D].

    Raises:
        ValueError: their codes, scales and biases are none, or contradict each other.
    """
    parts = list(rows) if isinstance(rows, (list, tuple)) else []
    if len(parts) != 3 or not all(isinstance(x, mx.array) and x.ndim == 4 for x in parts):
        raise ValueError("its rows have no codes, scales and biases")
    codes, scales, biases = parts
    *heads, n_words = codes.shape
    n_groups = n_words * 32 // bits // group
    if (
        codes.dtype != mx.uint32
        or n_words * 32 != n_groups * group * bits
        or scales.shape != (*heads, n_groups)
        or biases.shape != scales.shape
        or not mx.issubdtype(scales.dtype, mx.floating)
        or biases.dtype != scales.dtype
        or 0 in codes.shape
    ):
        raise ValueError(f"its codes are {codes.shape} and its scales {scales.shape}")
    return mx.dequantize(codes, scales, biases, group, bits)


def packed_as(held: Any, fresh: Any) -> Any:
    """A cache of mlx-lm's, with its rows packed where ``fresh``, an empty cache, packs them.

    Args:
        held: of the kind that ``dequantized`` returns; packed caches and windows stay as they are.

    Raises:
        InputError: a window, where ``fresh`` is a packed one.
    """
    if isinstance(held, CacheList):
        return CacheList(*map(packed_as, held.caches, fresh.caches))
    if isinstance(fresh, TurboRotatingKVCache) and type(held) is RotatingKVCache:
        raise InputError(
            f"A window of {held.max_size} tokens that mlx-lm saved cannot be packed: read the "
            "prompt again, with mlx_turbokv.cache_prompt."
        )
    if not isinstance(fresh, TurboKVCache) or type(held) is not KVCache or held.empty():
        return held
    arrays: Any = held.keys, held.values
    keys, values = (array[:, :, : held.offset] for array in arrays)
    for at in range(0, held.offset, STEP):
        rows = slice(at, min(at + STEP, held.offset))
        fresh.update_and_fetch(keys[:, :, rows], values[:, :, rows])
        mx.eval(fresh.state)
    return fresh


def unpacked(cache: Any, dtype: mx.Dtype | None = None) -> Any:
    """A packed cache as mlx-lm's own, its rows dequantised; any other cache as it is.

    Args:
        dtype: of the rows; None: the model's.

    Raises:
        InputError: a packed window, whose rows mlx-lm has in another order.
    """
    if isinstance(cache, CacheList):
        return CacheList(*(unpacked(sub, dtype) for sub in cache.caches))
    if isinstance(cache, TurboRotatingKVCache):
        raise InputError(
            f"A packed window of {cache.max_size} tokens cannot be converted: mlx-lm has its rows "
            "in another order."
        )
    if not isinstance(cache, TurboKVCache):
        return cache
    plain = KVCache()
    if not cache.empty():
        plain.keys, plain.values = map(mx.contiguous, cache.keys_and_values(dtype))
        plain.offset = cache.offset
        mx.eval(plain.state)
    return plain
