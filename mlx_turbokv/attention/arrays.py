"""K and V as a packed cache returns them to the model.

A cache returns ``TurboArray``s: lazily dequantised K and V that know their packed rows. Attention
reads the packed rows, and then nothing is dequantised; whatever else a model does with K and V
gets the dequantised values.

Building lazy arrays takes time at each layer and step. A model that does nothing with the K and V
of one token but pass them to attention gets ``Handle``s instead (cache/factory.py finds out).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from ..kernels.backend import Backend
from ..kernels.segments import AnyKV


@dataclass(frozen=True)
class Hidden:
    """Packed rows that models don't see: ``count`` rows from row ``first`` on."""

    first: int = 0
    count: int = 0


class Source(NamedTuple):
    """The packed rows of K and V, and the back-end that reads them.

    Args:
        held: arrays that live on in the cache and are computed from the newest rows, where these
            are not packed in ``packed``.
    """

    packed: AnyKV
    backend: Backend
    hidden: Hidden = Hidden()
    held: tuple[mx.array, ...] = ()


class TurboArray(mx.array):
    """K or V of a packed cache, dequantised if it is used. Operations return plain arrays."""

    source: Source
    is_keys = False


class Handle:
    """K or V of a packed cache without an array.

    ``shape``, ``dtype`` and ``ndim`` are those of the array that it replaces; an index gives what
    that array would, for models that cut rows off once there are many.
    """

    __slots__ = ("dtype", "is_keys", "source")
    ndim = 4

    def __init__(self, source: Source, dtype: mx.Dtype, is_keys: bool) -> None:
        self.source, self.dtype, self.is_keys = source, dtype, is_keys

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sequences, KV heads, rows that are not hidden, head_dim."""
        packed, _, hidden, _ = self.source
        batch, n_heads = packed.newest.shape[:2]
        layout = packed.layout
        head_dim = layout.k_head_dim if self.is_keys else layout.v_head_dim
        return batch, n_heads, packed.n_tokens - hidden.count, head_dim

    def __getitem__(self, index: Any) -> mx.array:
        return as_array(self)[index]


KVArray = mx.array | Handle  # what attention takes for K and V


def lazy_keys_and_values(
    source: Source, k_dtype: mx.Dtype, v_dtype: mx.Dtype
) -> tuple[TurboArray, TurboArray]:
    """K and V as models see them.

    Shapes:
        returns: [B, H, n, k_head_dim], [B, H, n, v_head_dim]; n are the rows that are not hidden.
    """
    packed, backend, hidden, _ = source
    keys, values = backend.dequantize(packed, k_dtype)
    if v_dtype != k_dtype:
        values = backend.dequantize(packed, v_dtype)[1]
    if hidden.count:
        keys, values = _without(keys, hidden), _without(values, hidden)
    keys, values = TurboArray(keys), TurboArray(values)
    keys.source = values.source = source
    keys.is_keys = True
    return keys, values


def as_array(x: KVArray) -> mx.array:
    """The array that a handle replaces; arrays as they are."""
    if not isinstance(x, Handle):
        return x
    return lazy_keys_and_values(x.source, x.dtype, x.dtype)[0 if x.is_keys else 1]


def _without(rows: mx.array, hidden: Hidden) -> mx.array:
    seen = rows[:, :, hidden.first + hidden.count :]
    return mx.concatenate([rows[:, :, : hidden.first], seen], axis=2) if hidden.first else seen
