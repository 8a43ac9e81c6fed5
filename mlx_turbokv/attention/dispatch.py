"""Attention over packed rows: few queries read the packed bytes, more go through dequantised rows."""

from __future__ import annotations

import mlx.core as mx

from ..kernels.backend import Backend
from ..kernels.decode import MAX_QUERIES
from ..kernels.packed import PackedKV, PaddedCausal, heads_at_once
from ..kernels.reference import with_starts
from ..kernels.rotate import rotate_to
from ..quant.layout import KVLayout
from .pacing import pace

# dequantised K and V of one attention call are kept below this by taking KV heads in slices
TRANSIENT_BYTES = 128 * 2**20
scaled_dot_product_attention = mx.fast.scaled_dot_product_attention


def _row_dtype(layout: KVLayout, dtype: mx.Dtype) -> mx.Dtype:
    """What rows become on the way to MLX's attention.

    Half keeps three more bits of a rotated row than bfloat16; raw bfloat16 rows may not fit it.
    """
    if mx.float32 == dtype:
        return dtype
    raw = layout.k_format.is_f16 or layout.v_format.is_f16
    return mx.bfloat16 if raw and layout.dtype == "bfloat16" else mx.float16


def attention(
    queries: mx.array,
    packed: PackedKV,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    starts: mx.array | None = None,
    *,
    backend: Backend,
) -> mx.array:
    """Scaled dot-product attention over packed rows.

    Up to 8 queries read the packed bytes; more go through half rows and MLX's fused attention.

    Args:
        mask: None, "causal" (the last query sees every row), or a bool or additive array.
        sinks: one logit a query head that takes part in the softmax and has no value.
        starts: the first valid row of each sequence, int32, beside a mask that is no array.

    Shapes:
        queries: [B, n_heads, L, k_head_dim]; sinks: [n_heads]; starts: [B].
        returns: [B, n_heads, L, v_head_dim], in the queries' dtype.
    """
    backend = backend.covering(packed.layout)
    if backend.attention is not None:
        return backend.attention(queries, packed, scale, mask, sinks, starts)
    # rows of padding have no positions, so they need starts that hide them
    hidden = packed.padding is None or starts is not None
    if queries.shape[2] <= MAX_QUERIES and not isinstance(mask, mx.array) and hidden:
        return backend.decode(queries, packed, scale, mask == "causal", sinks, starts)
    if queries.shape[2] <= MAX_QUERIES and starts is None and _is_padding_of(mask, queries, packed):
        return backend.decode(queries, packed, scale, True, sinks, mask.starts)
    if starts is not None:
        mask = with_starts(queries.shape[2], packed.n_tokens, mask, starts)
    return _through_rows(queries, packed, scale, mask, sinks, backend)


def _is_padding_of(mask: mx.array, queries: mx.array, packed: PackedKV) -> bool:
    """Whether the mask says no more than where these sequences begin, and is causal."""
    shape = (queries.shape[0], 1, queries.shape[2], packed.n_tokens)
    if type(mask) is not PaddedCausal or mask.shape != shape:
        return False
    return packed.centre is None or packed.padding is not None


def _through_rows(
    queries: mx.array,
    packed: PackedKV,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    backend: Backend,
) -> mx.array:
    layout, dtype = packed.layout, _row_dtype(packed.layout, queries.dtype)
    n_kv_heads = (packed.body if packed.n_body else packed.tail).shape[1]
    gqa_factor = queries.shape[1] // n_kv_heads
    turbo = layout.k_format.is_turbo
    q = rotate_to(queries, layout.k_head_dim, dtype) if turbo else queries.astype(dtype)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(dtype)
    sinks = None if sinks is None else sinks.astype(dtype)
    row_bytes = queries.shape[0] * packed.n_tokens * (layout.k_head_dim + layout.v_head_dim)
    step = heads_at_once(n_kv_heads, row_bytes * dtype.size, TRANSIENT_BYTES)

    outputs = []
    for first in range(0, n_kv_heads, step):
        count = min(step, n_kv_heads - first)
        keys, values = backend.rotated_rows(packed, dtype, first, count)
        heads = slice(first * gqa_factor, (first + count) * gqa_factor)
        per_head = isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1
        outputs.append(
            scaled_dot_product_attention(
                q[:, heads],
                keys,
                values,
                scale=scale,
                mask=mask[..., heads, :, :] if per_head else mask,
                sinks=None if sinks is None else sinks[heads],
            )
        )
    output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
    if layout.v_format.is_turbo:
        output = rotate_to(output, layout.v_head_dim, dtype, inverse=True)
    output = output.astype(queries.dtype)
    if queries.shape[2] > MAX_QUERIES:
        newest = packed.tail if packed.n_tail else packed.body
        pace.keep(output, newest, row_bytes * dtype.size * n_kv_heads + output.nbytes)
    return output
