"""Launches metal/dequantize.metal, and MLX's own attention over what it gives."""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import mlx.core as mx

from ..layout import TILE, KVLayout
from ..rotation import base_order, rotation_width, signs
from . import assemble, quantize, tables
from .decode import MAX_QUERIES, decode
from .packed import PackedKV, PaddedCausal
from .reference import with_starts

# dequantised K and V of one attention call are kept below this by taking KV heads in slices
TRANSIENT_BYTES = 128 * 2**20
THREADS = 256
SOURCE = f"""
TKV_SHARED(float4, shared, dequantize_floats(KD, CENTRED) / 4);
dequantize<T, KB, KG, KD, KW, VB, VG, VD, RAW, CENTRED>(
    body, tail, params, k_constants, v_constants, mu, table, starts, keys, values, shared,
    {assemble.THREAD});
"""
INPUTS = ("body", "tail", "params", "k_constants", "v_constants", *tables.ANCHOR_INPUTS)
scaled_dot_product_attention = mx.fast.scaled_dot_product_attention


class Plan(NamedTuple):
    """What a launch needs that depends on layout and dtype alone."""

    template: list[tuple[str, object]]
    k_constants: mx.array
    v_constants: mx.array


@lru_cache(maxsize=None)
def _plan(layout: KVLayout, dtype: mx.Dtype, centred: bool) -> Plan:
    k, v = tables.sides(layout)
    template = [("T", dtype), ("KB", k.bits), ("KG", k.group), ("KD", k.dim), ("KW", k.width)]
    template += [("VB", v.bits), ("VG", v.group), ("VD", v.dim), ("RAW", tables.RAW[layout.dtype])]
    template += [("CENTRED", centred)]
    return Plan(template, tables.constants(k), tables.constants(v))


def rotated_rows(
    packed: PackedKV, dtype: mx.Dtype, first: int, count: int, backend: str
) -> tuple[mx.array, mx.array]:
    """Rows of KV heads ``first`` to ``first + count``, turbo rows in the rotated basis.

    Shapes:
        returns: [B, count, n, k_head_dim] and [B, count, n, v_head_dim] in ``dtype``.
    """
    layout, n = packed.layout, packed.n_tokens
    body, tail = packed.body, packed.tail
    batch, n_heads = (body if packed.n_body else tail).shape[:2]
    centre = packed.centre
    plan = _plan(layout, dtype, centre is not None)
    params = tables.int_array(
        n_heads,
        first,
        count,
        body.shape[2] if packed.n_body else 0,
        packed.n_body // TILE,
        tail.shape[2] if packed.n_tail else 0,
        n,
        int(packed.padding is not None),
        *((0, 0) if centre is None else (centre.turning.half, int(centre.bare_first))),
    )
    kernel = assemble.build(
        "dequantize", "dequantize.metal", INPUTS, ("keys", "values"), SOURCE, backend
    )
    keys, values = kernel(
        inputs=[
            body if packed.n_body else tables.no_tiles(),
            tail if packed.n_tail else tables.no_tiles(),
            params,
            plan.k_constants,
            plan.v_constants,
            *tables.anchor_inputs(centre, n, packed.padding),
        ],
        template=plan.template,
        grid=(-(-n // TILE) * THREADS, batch * count, 2),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(batch, count, n, layout.k_head_dim), (batch, count, n, layout.v_head_dim)],
        output_dtypes=[dtype, dtype],
    )
    return keys, values


@lru_cache(maxsize=None)
def _signs(width: int) -> mx.array:
    array = mx.array(signs(width))
    mx.eval(array)
    return array


def rotate(x: mx.array, head_dim: int, inverse: bool = False) -> mx.array:
    """Rotate heads in float32, by MLX's Hadamard transform where the width is a power of two."""
    width = rotation_width(head_dim)
    if base_order(width) != 1:
        return quantize.rotate(x, head_dim, inverse)
    groups = x.astype(mx.float32).reshape(*x.shape[:-1], -1, width)
    if not inverse:
        groups = groups * _signs(width)
    groups = mx.hadamard_transform(groups, scale=1 / sqrt(width))
    if inverse:
        groups = groups * _signs(width)
    return groups.reshape(x.shape)


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
    backend: str = "metal",
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
    # rows of padding have no positions, so they need starts that hide them
    hidden = packed.padding is None or starts is not None
    if queries.shape[2] <= MAX_QUERIES and not isinstance(mask, mx.array) and hidden:
        return decode(queries, packed, scale, mask == "causal", sinks, starts, backend=backend)
    if queries.shape[2] <= MAX_QUERIES and starts is None and _is_padding_of(mask, queries, packed):
        return decode(queries, packed, scale, True, sinks, mask.starts, backend=backend)
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
    backend: str,
) -> mx.array:
    layout, dtype = packed.layout, _row_dtype(packed.layout, queries.dtype)
    n_kv_heads = (packed.body if packed.n_body else packed.tail).shape[1]
    gqa_factor = queries.shape[1] // n_kv_heads
    q = rotate(queries, layout.k_head_dim) if layout.k_format.is_turbo else queries
    q = q.astype(dtype)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(dtype)
    sinks = None if sinks is None else sinks.astype(dtype)
    row_bytes = queries.shape[0] * packed.n_tokens * (layout.k_head_dim + layout.v_head_dim)
    step = max(1, TRANSIENT_BYTES // (row_bytes * dtype.size))

    outputs = []
    for first in range(0, n_kv_heads, step):
        count = min(step, n_kv_heads - first)
        keys, values = rotated_rows(packed, dtype, first, count, backend)
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
        output = rotate(output, layout.v_head_dim, inverse=True)
    return output.astype(queries.dtype)


def dequantize(
    packed: PackedKV, dtype: mx.Dtype, *, backend: str = "metal"
) -> tuple[mx.array, mx.array]:
    """K and V as the model would have made them, quantisation error aside.

    Shapes:
        returns: [B, H, n, k_head_dim] and [B, H, n, v_head_dim] in ``dtype``.
    """
    layout = packed.layout
    n_heads = (packed.body if packed.n_body else packed.tail).shape[1]
    rotated = layout.k_format.is_turbo or layout.v_format.is_turbo
    keys, values = rotated_rows(packed, mx.float32 if rotated else dtype, 0, n_heads, backend)
    if layout.k_format.is_turbo:
        keys = rotate(keys, layout.k_head_dim, inverse=True)
    if layout.v_format.is_turbo:
        values = rotate(values, layout.v_head_dim, inverse=True)
    return keys.astype(dtype), values.astype(dtype)
