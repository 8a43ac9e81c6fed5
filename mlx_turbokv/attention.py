"""The one interception of attention.

A packed cache hands the model `TurboArray`s: lazily dequantised K and V that know the packed rows
they stand for. `mx.fast.scaled_dot_product_attention`, through which nearly every mlx-lm model
goes, is replaced once; where it meets a pair of them it reads the packed rows instead, and nothing
is dequantised. Whatever else a model does with K and V gets the dequantised values.
"""

from __future__ import annotations

import mlx.core as mx

from .kernels.backend import Backend
from .kernels.packed import PackedKV

_mlx_attention = mx.fast.scaled_dot_product_attention


class TurboArray(mx.array):
    """K or V of a packed cache: dequantised if it is used, and packed for attention.

    Any operation on it returns a plain array.
    """

    packed: PackedKV
    backend: Backend
    is_keys: bool


def lazy_keys_and_values(
    packed: PackedKV, backend: Backend, dtype: mx.Dtype
) -> tuple[TurboArray, TurboArray]:
    """K and V as models see them.

    Shapes:
        returns: [B, H, n, k_head_dim] and [B, H, n, v_head_dim] in ``dtype``.
    """
    arrays = []
    for is_keys, values in zip((True, False), backend.dequantize(packed, dtype)):
        array = TurboArray(values)
        array.packed, array.backend, array.is_keys = packed, backend, is_keys
        arrays.append(array)
    return arrays[0], arrays[1]


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
    if type(k) is TurboArray and type(v) is TurboArray:
        if k.packed is v.packed and k.is_keys and not v.is_keys and not options:
            return k.backend.attention(q, k.packed, scale, mask, sinks)
    return _mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)


def install() -> None:
    """Put the interception in place; once is enough, twice changes nothing."""
    mx.fast.scaled_dot_product_attention = scaled_dot_product_attention
