"""Launches metal/segments.metal."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..quant.layout import TILE, KVLayout, protected_layout
from . import assemble, tables
from .assemble import Launch
from .checks import (
    Input,
    anchor_inputs,
    check_inputs,
    check_segments,
    check_selected,
    tiles_input,
)
from .segments import Heads, Rows, SegmentedKV
from .trust import Kernel, require

THREADS = 256
SOURCE = f"""
TKV_SHARED(float4, shared, segments_floats(KD, CENTRED) / 4);
read_segments<T, F, Tensor<KB, KG, KD, KW>, Tensor<VB, VG, VD, VW>, Tensor<PKB, PKG, KD, KW>,
              Tensor<PVB, PVG, VD, VW>, Tensor<TKB, TKG, KD, KW>, Tensor<TVB, TVG, VD, VW>, RAW,
              CENTRED>(
    sink, body, tail, fresh_keys, fresh_values, (const device SegmentParams*)params, k_constants,
    v_constants, centre, cos_sin_table, keys, values, shared, {assemble.GROUP}, {assemble.LANE});
"""
INPUTS = ("sink", "body", "tail", "fresh_keys", "fresh_values", "params", "k_constants")
INPUTS += ("v_constants", *tables.ANCHOR_INPUTS[:2])


class SegmentParams(NamedTuple):
    """The run-time parameters of metal/segments.metal, in its order."""

    n_kv_heads: int
    first_head: int
    n_selected_heads: int
    n_sequences: int
    sink_stride: int
    body_stride: int
    tail_stride: int
    n_sink: int
    n_sunk: int
    tail_start: int
    n_packed: int
    n_tokens: int
    split_pairs: int
    n_uncentred: int


@lru_cache(maxsize=256)
def _launch(
    factory: Callable | None,
    backend: str,
    layout: KVLayout,
    fine_tail: bool,
    dtypes: tuple[mx.Dtype, mx.Dtype],
    params: SegmentParams,
    n_body: int,
    starts: tuple[int, ...],
    ends: tuple[int, ...],
    centred: bool,
) -> Launch:
    """
    Args:
        factory: that of assemble.py; a part of the key.
        fine_tail: whether the tail's rows are protected.
        dtypes: of the rows that are made, and of those that are not packed.
    """
    k, v = tables.tensor_parameters(layout)
    fine = protected_layout(layout)
    batch, n_heads = heads = params.n_sequences, params.n_kv_heads
    n_fresh = params.n_tokens - params.n_packed
    first, count = params.first_head, params.n_selected_heads
    check_segments(
        "segments", batch, n_body, params.n_packed, params.n_sunk, -(-params.n_sink // TILE),
        params.sink_stride, params.tail_start, ends,
    )  # fmt: skip
    n_tail = params.n_packed - params.tail_start
    held = n_body <= TILE * params.body_stride and 0 <= n_tail <= TILE * params.tail_stride
    if not held or len(starts) != batch or params.n_tokens < 1 or n_fresh < 0:
        raise ValueError(
            f"[segments] {params.n_tokens} rows, {n_tail} of them in a tail of "
            f"{params.tail_stride} tiles, do not fit a body of {params.body_stride}."
        )
    check_selected("segments", first, count, n_heads)
    dtype, fresh = dtypes
    tail = fine if fine_tail else layout
    template = [("T", dtype), ("F", fresh), *tables.template(layout)]
    for name, own in (("P", fine), ("T", tail)):
        for side, tensor in zip("KV", tables.tensor_parameters(own)):
            template += [(f"{name}{side}B", tensor.bits), (f"{name}{side}G", tensor.group)]
    template += [("RAW", tables.RAW[layout.dtype]), ("CENTRED", centred)]
    require(Kernel("segments", backend, layout, dtype, centred, protected=fine_tail, fresh=fresh))
    outputs = ("keys", "values")
    kernel = assemble.build("read_segments", "segments.metal", INPUTS, outputs, SOURCE, backend)
    wanted = (
        tiles_input("sink", fine, heads, params.sink_stride),
        tiles_input("body", layout, heads, params.body_stride),
        tiles_input("tail", tail, heads, params.tail_stride),
        Input("fresh keys", (*heads, n_fresh, k.dim), fresh) if n_fresh else None,
        Input("fresh values", (*heads, n_fresh, v.dim), fresh) if n_fresh else None,
        *(None, None, None),
        *anchor_inputs(layout, heads, centred, False)[:2],
    )

    def launch(*inputs: mx.array) -> list[mx.array]:
        check_inputs("segments", wanted, inputs)
        return kernel(
            inputs=list(inputs),
            template=template,
            grid=(-(-params.n_tokens // TILE) * THREADS, count, batch),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(batch, count, params.n_tokens, side.dim) for side in (k, v)],
            output_dtypes=[dtype] * 2,
        )

    numbers = tables.int_array(*params, *starts, *ends)
    call = assemble.replayed(launch, backend)
    return Launch(call, numbers, tables.constants(k), tables.constants(v))


def segment_rows(kv: SegmentedKV, dtype: mx.Dtype, heads: Heads, backend: str) -> Rows:
    """All rows of some KV heads, turbo rows in the rotated basis, in one launch.

    Keys that have scales are times these, those too that are not packed.

    Shapes:
        returns: [B, heads, kv.n_tokens, k_head_dim] and [.., v_head_dim], in ``dtype``.

    Raises:
        ValueError: a shape, type or count does not fit the others.
    """
    batch, n_heads = kv.newest.shape[:2]
    centre, n_sink = kv.centre, kv.n_sink if kv.n_sunk else 0
    own: mx.Dtype = getattr(mx, kv.layout.dtype)
    if kv.fresh is None:
        fresh = no_rows(own), no_rows(own)
    else:
        fresh = kv.fresh
    split_pairs, n_uncentred = 0, 0
    if centre is not None:
        split_pairs, n_uncentred = centre.rope.split_pairs, int(centre.first_key_uncentred)
    params = SegmentParams(
        n_kv_heads=n_heads,
        first_head=heads[0],
        n_selected_heads=heads[1],
        n_sequences=batch,
        sink_stride=kv.sink.shape[2] if n_sink else 0,
        body_stride=kv.body.shape[2] if kv.n_body else 0,
        tail_stride=kv.tail.shape[2] if kv.n_tail else 0,
        n_sink=n_sink,
        n_sunk=kv.n_sunk if n_sink else 0,
        tail_start=kv.tail_start,
        n_packed=kv.n_packed,
        n_tokens=kv.n_tokens,
        split_pairs=split_pairs,
        n_uncentred=n_uncentred,
    )
    launch = _launch(
        assemble.factory, backend, kv.layout, kv.tail_layout == kv.sink_layout,
        (dtype, fresh[0].dtype), params, kv.n_body, kv.starts or (0,) * batch,
        kv.coarse_end or (0,) * batch, centre is not None,
    )  # fmt: skip
    keys, values = launch.call(
        kv.sink if n_sink else tables.no_tiles(),
        kv.body if kv.n_body else tables.no_tiles(),
        kv.tail if kv.n_tail else tables.no_tiles(),
        *fresh,
        launch.params,
        launch.k_constants,
        launch.v_constants,
        *tables.anchor_inputs(centre, max(kv.n_packed, 1), None)[:2],
    )
    return keys, values


@cache
def no_rows(dtype: mx.Dtype) -> mx.array:
    """Stands for rows that are not packed where there are none."""
    array = mx.zeros((8,), dtype)
    mx.eval(array)
    return array
