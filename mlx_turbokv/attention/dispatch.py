"""Attention over packed rows: few queries read them in the kernel, more take dequantised rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from ..kernels.backend import Backend
from ..kernels.decode import MAX_QUERIES
from ..kernels.heads import attention_by_heads, scaled_dot_product_attention
from ..kernels.packed import PackedKV, PaddedCausal
from ..kernels.reference import with_left_padding
from ..kernels.segments import AnyKV, SegmentedKV, scales_of
from ..quant.layout import KVLayout
from ..quant.rotate import rotate
from .pacing import limit_in_flight


def row_dtype(layout: KVLayout, dtype: mx.Dtype) -> mx.Dtype:
    """What rows become on the way to MLX's attention.

    Half keeps three more bits of a rotated row than bfloat16; raw bfloat16 rows may not fit it.
    """
    if mx.float32 == dtype:
        return dtype
    raw = layout.k_format.is_f16 or layout.v_format.is_f16
    return mx.bfloat16 if raw and layout.dtype == "bfloat16" else mx.float16


def attention(
    queries: mx.array,
    packed: AnyKV,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    left_padding: mx.array | None = None,
    *,
    backend: Backend,
    held: tuple[mx.array, ...] = (),
) -> mx.array:
    """Scaled dot-product attention over packed rows.

    Up to 8 queries take the decode kernel; more take dequantised rows and MLX's fused attention.

    Args:
        mask: None, "causal" (the last query sees every row), or a bool or additive array.
        sinks: one logit a query head that takes part in the softmax and has no value.
        left_padding: rows before the first valid one of each sequence; the mask is no array then.
        held: as ``Source`` has it.

    Shapes:
        queries: [B, n_heads, L, k_head_dim]; sinks: [n_heads]; left_padding: [B] int32.
        returns: [B, n_heads, L, v_head_dim], in the queries' dtype.
    """
    if isinstance(packed, SegmentedKV) and packed.fresh is not None and not packed.n_packed:
        k, v = packed.fresh
        q = queries.astype(k.dtype)
        sinks = None if sinks is None else sinks.astype(k.dtype)
        output = scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
        output = output.astype(queries.dtype)
        if backend.decode is not None:
            _start(output, packed, held, k.nbytes + v.nbytes)
        return output
    backend = backend.covering(packed.layout)
    decode, rotated_rows = backend.decode, backend.rotated_rows
    if decode is None or rotated_rows is None:
        return backend.attention(queries, packed, scale, mask, sinks, left_padding)
    few = queries.shape[2] <= MAX_QUERIES and packed.n_packed == packed.n_tokens
    # rows of padding have no positions, so they must be hidden
    hidden = packed.left_padding is None or left_padding is not None
    if few and hidden and not isinstance(mask, mx.array):
        return decode(queries, packed, scale, mask == "causal", sinks, left_padding)
    if (
        few
        and left_padding is None
        and isinstance(mask, PaddedCausal)
        and _is_causal_with_padding(mask, queries, packed)
    ):
        return decode(queries, packed, scale, True, sinks, mask.left_padding)
    if left_padding is not None:
        mask = with_left_padding(queries.shape[2], packed.n_tokens, mask, left_padding)
    return _dequantized(queries, packed, scale, mask, sinks, rotated_rows, held)


def _start(output: mx.array, packed: AnyKV, held: tuple[mx.array, ...], n_bytes: int) -> None:
    """Start the attention of a long prompt, which reads ``n_bytes`` of rows."""
    if output.shape[2] > MAX_QUERIES:
        limit_in_flight(output, held or (packed.newest,), n_bytes + output.nbytes)


def _is_causal_with_padding(mask: PaddedCausal, queries: mx.array, packed: AnyKV) -> bool:
    """Whether the mask says no more than where these sequences begin, and is causal."""
    if mask.shape != (queries.shape[0], 1, queries.shape[2], packed.n_tokens):
        return False
    anywhere = packed.centre is None and isinstance(packed, PackedKV)
    return anywhere or packed.left_padding is not None


def _dequantized(
    queries: mx.array,
    packed: AnyKV,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    rotated_rows: Callable,
    held: tuple[mx.array, ...] = (),
) -> mx.array:
    """MLX's fused attention over dequantised rows."""
    layout, dtype = packed.layout, row_dtype(packed.layout, queries.dtype)
    turbo = layout.k_format.is_turbo
    q = queries
    if (scales := scales_of(packed)) is not None:
        q = scales.unscaled(q)
    q = rotate(q, layout.k_head_dim, dtype=dtype) if turbo else q.astype(dtype)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(dtype)
    n_kv_heads = packed.newest.shape[1]
    bytes_each = packed.row_values(queries.shape[0]) * dtype.size
    output = attention_by_heads(
        q,
        partial(rotated_rows, packed, dtype),
        n_kv_heads,
        bytes_each,
        scale,
        mask,
        None if sinks is None else sinks.astype(dtype),
    )
    if layout.v_format.is_turbo:
        output = rotate(output, layout.v_head_dim, inverse=True, dtype=dtype)
    output = output.astype(queries.dtype)
    _start(output, packed, held, bytes_each * n_kv_heads)
    return output
