"""The one interception of attention.

A packed cache hands the model `TurboArray`s: lazily dequantised K and V that know the packed rows
they stand for. `mx.fast.scaled_dot_product_attention`, through which nearly every mlx-lm model
goes, is replaced once; where it meets a pair of them it reads the packed rows instead, and nothing
is dequantised. Whatever else a model does with K and V gets the dequantised values.

Building arrays that nobody computes takes time at each layer and step. A model that was seen to do
nothing with the K and V of one token but pass them on gets `Handle`s instead (`api.py` tries it).
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..kernels.backend import Backend
from ..kernels.packed import PackedKV, PaddedCausal
from ..kernels.tables import int_array
from .dispatch import attention

_mlx_attention = mx.fast.scaled_dot_product_attention


class Hidden(NamedTuple):
    """Packed rows that models don't see: ``count`` rows from row ``first`` on."""

    first: int = 0
    count: int = 0


class Source(NamedTuple):
    """What K and V of a packed cache stand for, and what reads it."""

    packed: PackedKV
    backend: Backend
    hidden: Hidden = Hidden()


class TurboArray(mx.array):
    """K or V of a packed cache: dequantised if it is used, and packed for attention.

    Any operation on it returns a plain array.
    """

    source: Source
    is_keys = False


def lazy_keys_and_values(source: Source, dtype: mx.Dtype) -> tuple[TurboArray, TurboArray]:
    """K and V as models see them.

    Shapes:
        returns: [B, H, n, k_head_dim] and [B, H, n, v_head_dim] in ``dtype``; n are the rows that
            are not hidden.
    """
    packed, backend, hidden = source
    keys, values = backend.dequantize(packed, dtype)
    if hidden.count:
        keys, values = _without(keys, hidden), _without(values, hidden)
    keys, values = TurboArray(keys), TurboArray(values)
    keys.source = values.source = source
    keys.is_keys = True
    return keys, values


class Handle:
    """K or V of a packed cache with no array behind it, for a model that only passes them on.

    ``shape``, ``dtype`` and ``ndim`` are those of the array that it stands for.
    """

    __slots__ = ("dtype", "is_keys", "source")
    ndim = 4

    def __init__(self, source: Source, dtype: mx.Dtype, is_keys: bool) -> None:
        self.source, self.dtype, self.is_keys = source, dtype, is_keys

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sequences, KV heads, rows that are not hidden, head_dim."""
        packed, _, hidden = self.source
        batch, n_heads = (packed.body if packed.n_body else packed.tail).shape[:2]
        layout = packed.layout
        head_dim = layout.k_head_dim if self.is_keys else layout.v_head_dim
        return batch, n_heads, packed.n_tokens - hidden.count, head_dim


def _as_array(x: mx.array | Handle) -> mx.array:
    if type(x) is not Handle:
        return x
    return lazy_keys_and_values(x.source, x.dtype)[0 if x.is_keys else 1]


def _without(rows: mx.array, hidden: Hidden) -> mx.array:
    seen = rows[:, :, hidden.first + hidden.count :]
    return mx.concatenate([rows[:, :, : hidden.first], seen], axis=2) if hidden.first else seen


def scaled_dot_product_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **options,
) -> mx.array:
    """`mx.fast.scaled_dot_product_attention` that reads packed K and V where it is given them."""
    kind = type(k)
    if (kind is Handle or kind is TurboArray) and type(v) is kind:
        source = k.source
        if source is v.source and k.is_keys and not v.is_keys and not options:
            if source.hidden.count:
                return _attention_past_hidden_rows(q, source, scale, mask, sinks)
            return attention(q, source.packed, scale, mask, sinks, backend=source.backend)
    k, v = _as_array(k), _as_array(v)
    return _mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)


def _attention_past_hidden_rows(
    q: mx.array, source: Source, scale: float, mask: mx.array | str | None, sinks: mx.array | None
) -> mx.array:
    packed, backend, hidden = source
    if mask is None and hidden.first == 0:
        starts = int_array(*[hidden.count] * q.shape[0])
        return attention(q, packed, scale, None, sinks, starts, backend=backend)
    if type(mask) is PaddedCausal and q.shape[2] == 1:
        starts = mask.starts[: q.shape[0]] + hidden.count
        return attention(q, packed, scale, None, sinks, starts, backend=backend)
    mask = with_hidden_columns(mask, hidden, q.shape[2], packed.n_tokens)
    return attention(q, packed, scale, mask, sinks, backend=backend)


def with_hidden_columns(
    mask: mx.array | str | None, hidden: Hidden, n_queries: int, n_rows: int
) -> mx.array:
    """A mask over all packed rows from one over those that are seen.

    Shapes:
        mask: [..., n_rows - hidden.count], "causal" (lower right) or None.
        returns: [..., n_rows].
    """
    if isinstance(mask, mx.array):
        fill = False if mask.dtype == mx.bool_ else -mx.inf
        columns = mx.full((*mask.shape[:-1], hidden.count), fill, mask.dtype)
        parts = [mask[..., : hidden.first], columns, mask[..., hidden.first :]]
        return mx.concatenate(parts if hidden.first else parts[1:], axis=-1)
    rows = mx.arange(n_rows)[None]
    seen = (rows < hidden.first) | (rows >= hidden.first + hidden.count)
    if mask is None:
        return seen
    return seen & (rows <= mx.arange(n_rows - n_queries, n_rows)[:, None])


def install() -> None:
    """Put the interception in place; once is enough, twice changes nothing."""
    mx.fast.scaled_dot_product_attention = scaled_dot_product_attention
