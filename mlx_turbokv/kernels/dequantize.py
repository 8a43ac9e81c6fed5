"""Launches metal/dequantize.metal."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx

from ..centring.centre import INVERSE_SCALES
from ..quant.layout import TILE, KVLayout
from ..quant.rotate import rotate
from . import assemble, tables
from .checks import (
    anchor_inputs,
    check_counts,
    check_inputs,
    check_kept,
    check_selected,
    tiles_input,
)
from .packed import PackedKV
from .segments import scales_of
from .trust import Kernel, require

THREADS = 256
SOURCE = f"""
TKV_SHARED(float4, shared, dequantize_floats(KD, CENTRED) / 4);
dequantize<T, Tensor<KB, KG, KD, KW>, Tensor<VB, VG, VD, VW>, RAW, CENTRED>(
    body, tail, params, k_constants, v_constants, centre, cos_sin_table, left_padding, keys, values,
    shared, {assemble.GROUP}, {assemble.LANE});
"""
INPUTS = ("body", "tail", "params", "k_constants", "v_constants", *tables.ANCHOR_INPUTS)
CENTRE = INPUTS.index("centre")


class Launch(assemble.Launch):
    """One launch, and what it is given beside the arrays of the cache."""

    def inputs(self, packed: PackedKV) -> tuple[mx.array, ...]:
        """The arrays of a launch over these rows."""
        return (
            packed.body if packed.n_body else tables.no_tiles(),
            packed.tail if packed.n_tail else tables.no_tiles(),
            self.params,
            self.k_constants,
            self.v_constants,
            *tables.anchor_inputs(packed.centre, packed.n_tokens, packed.left_padding),
        )


@lru_cache(maxsize=256)
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
    k, v = tables.tensor_parameters(layout)
    template = [("T", dtype), *tables.template(layout), ("RAW", tables.RAW[layout.dtype])]
    template += [("CENTRED", anchors is not None)]
    batch, n_heads = shape
    first, count = heads
    n_body, body_stride, n_tail, tail_stride = counts
    check_counts("dequantize", *counts)
    check_selected("dequantize", first, count, n_heads)
    n = n_body + n_tail
    split_pairs, first_key_uncentred, has_padding = anchors or (0, 0, 0)
    params = tables.int_array(
        n_heads,
        first,
        count,
        body_stride,
        n_body // TILE,
        tail_stride,
        n,
        int(has_padding),
        split_pairs,
        int(first_key_uncentred),
    )
    require(Kernel("dequantize", backend, layout, dtype, anchors is not None))
    outputs = ("keys", "values")
    kernel = assemble.build("dequantize", "dequantize.metal", INPUTS, outputs, SOURCE, backend)
    wanted = (
        tiles_input("body", layout, shape, body_stride),
        tiles_input("tail", layout, shape, tail_stride),
        *(None, None, None),
        *anchor_inputs(layout, shape, anchors is not None, bool(has_padding)),
    )

    def launch(*inputs: mx.array) -> list[mx.array]:
        check_inputs("dequantize", wanted, inputs)
        return kernel(
            inputs=list(inputs),
            template=template,
            grid=(-(-n // TILE) * THREADS, count, batch),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(batch, count, n, side.dim) for side in (k, v)],
            output_dtypes=[dtype] * 2,
        )

    call = assemble.replayed(launch, backend)
    return Launch(call, params, tables.constants(k), tables.constants(v))


def _shapes(packed: PackedKV) -> tuple:
    """``shape``, ``counts`` and ``anchors`` of a launch over these rows."""
    layout, body, n_body, tail, n_tail, centre, left_padding = packed
    batch, n_heads, body_stride, _ = body.shape if n_body else (0, 0, 0, 0)
    if n_tail:
        batch, n_heads, tail_stride, _ = tail.shape
    else:
        tail_stride = 0
    anchors = None
    if centre is not None:
        anchors = (centre.rope.split_pairs, centre.first_key_uncentred, left_padding is not None)
    return (batch, n_heads), (n_body, body_stride, n_tail, tail_stride), anchors


def rotated_rows(
    packed: PackedKV, dtype: mx.Dtype, first: int, count: int, backend: str
) -> tuple[mx.array, mx.array]:
    """Rows of KV heads ``first`` to ``first + count``, turbo rows in the rotated basis.

    Shapes:
        returns: [B, count, n, k_head_dim] and [B, count, n, v_head_dim] in ``dtype``.
    """
    heads, shapes = (first, count), _shapes(packed)
    launch = _launch(assemble.factory, backend, packed.layout, dtype, heads, *shapes)
    keys, values = launch.call(*launch.inputs(packed))
    return keys, values


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
        check_kept("dequantize", packed.n_tail, packed.tail.shape[2])
        whole = packed._replace(n_tail=TILE * packed.tail.shape[2])
    scaled = scales_of(packed) is not None
    launch = _restoring(assemble.factory, backend, packed.layout, dtype, scaled, *_shapes(whole))
    keys, values = launch.call(*launch.inputs(whole))
    if whole is packed:
        return keys, values
    return keys[:, :, :n], values[:, :, :n]


@lru_cache(maxsize=64)
def _restoring(
    factory: Callable | None,
    backend: str,
    layout: KVLayout,
    dtype: mx.Dtype,
    scaled: bool,
    *shapes: tuple,
) -> Launch:
    """A launch over all heads, and what brings its rows back to the model's own basis.

    Args:
        scaled: keys were multiplied by scales.
    """
    k_turbo, v_turbo = layout.k_format.is_turbo, layout.v_format.is_turbo
    row_dtype = mx.float32 if k_turbo or v_turbo else dtype
    (_, n_heads), *_ = shapes
    launch = _launch(factory, backend, layout, row_dtype, (0, n_heads), *shapes)

    def restore(*inputs: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = launch.call(*inputs)
        if k_turbo:
            keys = rotate(keys, layout.k_head_dim, inverse=True)
        if scaled:
            keys = keys * inputs[CENTRE][:, INVERSE_SCALES, None]
        if v_turbo:
            values = rotate(values, layout.v_head_dim, inverse=True)
        return keys.astype(dtype), values.astype(dtype)

    return launch._replace(call=assemble.replayed(restore, backend))
