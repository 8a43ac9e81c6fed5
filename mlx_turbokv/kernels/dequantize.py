"""Launches metal/dequantize.metal, and MLX's own attention over what it gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..layout import TILE, KVLayout
from ..rotation import base_order, rotation_matrix, rotation_width, signs
from . import assemble, quantize, tables
from .decode import MAX_QUERIES, decode
from .pace import pace
from .packed import PackedKV, PaddedCausal, heads_at_once
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


class Launch(NamedTuple):
    """One launch as a call on arrays, and what it is given beside those of the cache."""

    call: Callable
    params: mx.array
    k_constants: mx.array
    v_constants: mx.array

    def inputs(self, packed: PackedKV) -> tuple[mx.array, ...]:
        """The arrays of a launch over these rows."""
        return (
            packed.body if packed.n_body else tables.no_tiles(),
            packed.tail if packed.n_tail else tables.no_tiles(),
            self.params,
            self.k_constants,
            self.v_constants,
            *tables.anchor_inputs(packed.centre, packed.n_tokens, packed.padding),
        )


@lru_cache(maxsize=64)
def _launch(
    factory: Callable | None,
    backend: str,
    layout: KVLayout,
    dtype: mx.Dtype,
    heads: tuple[int, int],
    shape: tuple[int, int],
    counts: tuple[int, int, int, int],
    anchors: tuple[int, bool, bool] | None,
) -> Launch:
    """
    Args:
        factory: that of assemble.py; a part of the key.
        heads: the first that is wanted, and how many.
        shape: sequences, KV heads.
        counts: body rows, tiles of the body's buffer, tail rows, tiles of the tail's buffer.
        anchors: of centred keys: pairs of dims that lie apart, whether first keys are bare,
            whether rows of padding come first.
    """
    k, v = tables.sides(layout)
    template = [*tables.template(layout, dtype), ("CENTRED", anchors is not None)]
    batch, n_heads = shape
    first, count = heads
    n_body, body_stride, n_tail, tail_stride = counts
    n = n_body + n_tail
    half, bare_first, has_starts = anchors or (0, 0, 0)
    params = tables.int_array(
        n_heads,
        first,
        count,
        body_stride,
        n_body // TILE,
        tail_stride,
        n,
        int(has_starts),
        half,
        int(bare_first),
    )
    kernel = assemble.build(
        "dequantize", "dequantize.metal", INPUTS, ("keys", "values"), SOURCE, backend
    )

    def call(*inputs: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = kernel(
            inputs=list(inputs),
            template=template,
            grid=(-(-n // TILE) * THREADS, batch * count, 2),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[
                (batch, count, n, layout.k_head_dim), (batch, count, n, layout.v_head_dim)
            ],
            output_dtypes=[dtype, dtype],
        )  # fmt: skip
        return keys, values

    return Launch(call, params, tables.constants(k), tables.constants(v))


def _shapes(packed: PackedKV) -> tuple:
    """``shape``, ``counts`` and ``anchors`` of a launch over these rows."""
    layout, body, n_body, tail, n_tail, centre, padding = packed
    batch, n_heads, body_stride, _ = body.shape if n_body else (0, 0, 0, 0)
    if n_tail:
        batch, n_heads, tail_stride, _ = tail.shape
    else:
        tail_stride = 0
    anchors = None
    if centre is not None:
        anchors = (centre.turning.half, centre.bare_first, padding is not None)
    return (batch, n_heads), (n_body, body_stride, n_tail, tail_stride), anchors


def rotated_rows(
    packed: PackedKV, dtype: mx.Dtype, first: int, count: int, backend: str
) -> tuple[mx.array, mx.array]:
    """Rows of KV heads ``first`` to ``first + count``, turbo rows in the rotated basis.

    Shapes:
        returns: [B, count, n, k_head_dim] and [B, count, n, v_head_dim] in ``dtype``.
    """
    key = assemble.factory, backend, packed.layout, dtype, (first, count), *_shapes(packed)
    launch = _launch(*key)
    return launch.call(*launch.inputs(packed))


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
    groups = x.astype(mx.float32)
    if width < head_dim:
        groups = groups.reshape(*x.shape[:-1], -1, width)
    if not inverse:
        groups = groups * _signs(width)
    groups = mx.hadamard_transform(groups, scale=1 / sqrt(width))
    if inverse:
        groups = groups * _signs(width)
    return groups.reshape(x.shape) if width < head_dim else groups


@lru_cache(maxsize=None)
def _half_matrix(width: int, inverse: bool) -> mx.array:
    matrix = rotation_matrix(width)
    array = mx.array((matrix if inverse else matrix.T).astype(np.float16))
    mx.eval(array)
    return array


def _rotated(x: mx.array, head_dim: int, dtype: mx.Dtype, inverse: bool = False) -> mx.array:
    """Rotate heads on the way to MLX's attention or from it, half rows in one product.

    Sums are float32. All entries of the matrix are +c or -c, and in half c is 1e-4 too small where
    it is no power of two: a fifth of what rounding the result may change.

    Shapes:
        x: [B, H, L, head_dim]; returns the same in ``dtype``.
    """
    if dtype != mx.float16:
        return rotate(x, head_dim, inverse).astype(dtype)
    width = rotation_width(head_dim)
    groups = x.astype(dtype)
    if width < head_dim:
        groups = groups.reshape(*x.shape[:-1], -1, width)
    return (groups @ _half_matrix(width, inverse)).reshape(x.shape)


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
    turbo = layout.k_format.is_turbo
    q = _rotated(queries, layout.k_head_dim, dtype) if turbo else queries.astype(dtype)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(dtype)
    sinks = None if sinks is None else sinks.astype(dtype)
    row_bytes = queries.shape[0] * packed.n_tokens * (layout.k_head_dim + layout.v_head_dim)
    step = heads_at_once(n_kv_heads, row_bytes * dtype.size, TRANSIENT_BYTES)

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
        output = _rotated(output, layout.v_head_dim, dtype, inverse=True)
    output = output.astype(queries.dtype)
    if queries.shape[2] > MAX_QUERIES:
        newest = packed.tail if packed.n_tail else packed.body
        pace.keep(output, newest, row_bytes * dtype.size * n_kv_heads + output.nbytes)
    return output


def dequantize(
    packed: PackedKV, dtype: mx.Dtype, *, backend: str = "metal"
) -> tuple[mx.array, mx.array]:
    """K and V as the model would have made them, quantisation error aside.

    Built at each decode step of a model that gets arrays, and seldom evaluated: whole tiles are
    dequantised and cut after it, so that the graph is the same for as long as the buffers are.

    Shapes:
        returns: [B, H, n, k_head_dim] and [B, H, n, v_head_dim] in ``dtype``.
    """
    n, whole = packed.n_tokens, packed
    if packed.n_tail % TILE:
        whole = packed._replace(n_tail=TILE * packed.tail.shape[2])
    launch = _restoring(assemble.factory, backend, packed.layout, dtype, *_shapes(whole))
    keys, values = launch.call(*launch.inputs(whole))
    if whole is packed:
        return keys, values
    return keys[:, :, :n], values[:, :, :n]


@lru_cache(maxsize=64)
def _restoring(
    factory: Callable | None, backend: str, layout: KVLayout, dtype: mx.Dtype, *shapes: tuple
) -> Launch:
    """A launch over all heads, and what brings its rows back to the model's own basis."""
    k_turbo, v_turbo = layout.k_format.is_turbo, layout.v_format.is_turbo
    row_dtype = mx.float32 if k_turbo or v_turbo else dtype
    (_, n_heads), *_ = shapes
    launch = _launch(factory, backend, layout, row_dtype, (0, n_heads), *shapes)

    def restore(*inputs: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = launch.call(*inputs)
        if k_turbo:
            keys = rotate(keys, layout.k_head_dim, inverse=True)
        if v_turbo:
            values = rotate(values, layout.v_head_dim, inverse=True)
        return keys.astype(dtype), values.astype(dtype)

    return launch._replace(call=assemble.replayed(restore, backend))
