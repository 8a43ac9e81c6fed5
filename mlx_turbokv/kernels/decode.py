"""Launches metal/decode.metal and merge.metal: attention of few queries over packed rows."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..quant.layout import TILE, KVLayout
from . import assemble, tables, tuned, tuning
from .checks import (
    Input,
    anchor_inputs,
    check_counts,
    check_heads,
    check_inputs,
    check_sinks,
    padding_input,
    tiles_input,
)
from .packed import PackedKV
from .trust import Kernel, require
from .tuning import Tuning

MAX_QUERIES = 8
MERGE_THREADS = 256
PARTIAL_SOURCE = f"""
typedef DecodeConfig<T, Tensor<KB, KG, KD, KW>, Tensor<VB, VG, VD, VW>, RAW, ROWS, CENTRED, WHOLE,
                     STEP, SIMD_GROUPS, KEY_COLUMNS, LUT_KIB, PREFETCH, HALF2> Config;
TKV_SHARED_ALIGNED(float4, shared, DecodeMemory<Config>::END / 4);
const DecodeInputs<T> inputs = {{
    queries, body, tail, left_padding, (const device DecodeParams*)params, k_constants,
    v_constants, mu, cos_sin_table, sinks}};
decode_partial<Config>(inputs, result, shared, {assemble.THREAD});
"""
PARTIAL_INPUTS = ("queries", "body", "tail", "left_padding", "params", "k_constants")
PARTIAL_INPUTS += ("v_constants", *tables.ANCHOR_INPUTS[:2], "sinks")
MERGE_SOURCE = f"""
TKV_SHARED(float4, shared, 2 * VD);
decode_merge<T, VD, VW>(
    partial, sinks, params, v_constants, output, shared, {assemble.THREAD});
"""
MERGE_INPUTS = ("partial", "sinks", "params", "v_constants")


class Launch(NamedTuple):
    """One or two kernels as a call on arrays, and its parameters: the same for a step's layers."""

    call: Callable
    params: mx.array
    k_constants: mx.array
    v_constants: mx.array


class DecodeParams(NamedTuple):
    """The run-time parameters of metal/attention.h, in its order; ``scale`` as its bits."""

    n_rows: int
    n_queries: int
    n_kv_heads: int
    causal: bool
    body_stride: int
    body_tiles: int
    tail_stride: int
    n_tokens: int
    n_splits: int
    has_left_padding: bool
    has_sinks: bool
    scale: int
    opaque_one: int
    split_pairs: int
    n_uncentred: int
    stats_offset: int


def rows_and_splits(
    cut: Tuning, backend: str, n_rows: int, widest: int, n_groups: int, n_tokens: int,
    splits: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Query rows of a threadgroup, and splits of a head's tokens, as a tuning cuts a launch.

    Args:
        n_rows: query rows a KV head.
        widest: the larger head_dim.
        n_groups: sequences times KV heads.
        splits: those asked for; None: as the tuning says.
    """
    rows = cut.rows_at_once(n_rows, widest)
    if splits is None:
        passes, n_tiles = -(-n_rows // rows), -(-n_tokens // TILE)
        splits = cut.n_splits(n_tiles, n_groups * passes, tuning.n_cores(backend))
    if splits == 1 and n_groups * n_rows <= cut.whole_rows:
        rows = 1
    return rows, splits


@lru_cache(maxsize=256)
def _launch(
    factory: Callable | None,
    backend: str,
    layout: KVLayout,
    dtype: mx.Dtype,
    shape: tuple[int, int, int, int],
    counts: tuple[int, int, int, int],
    scale: float,
    flags: tuple[bool, bool, bool],
    anchors: tuple[int, bool] | None,
    splits: int | None,
    cut: Tuning,
) -> Launch:
    """
    Args:
        factory: that of assemble.py; a part of the key.
        shape: sequences, query heads, KV heads, queries.
        counts: body rows, tiles of the body's buffer, tail rows, tiles of the tail's buffer.
        flags: causal, sinks, left padding.
        anchors: of centred keys: pairs of dims that lie apart, whether first keys are bare.
        splits: those of a head; None: as the tuning says.
    """
    k, v = tables.tensor_parameters(layout)
    batch, n_heads, n_kv_heads, n_queries = shape
    n_body, body_stride, n_tail, tail_stride = counts
    check_counts("decode", *counts)
    check_heads("decode", n_heads, n_kv_heads, n_queries)
    causal, has_sinks, has_padding = flags
    n_rows = n_heads // n_kv_heads * n_queries
    n_groups = batch * n_kv_heads
    rows, splits = rows_and_splits(
        cut, backend, n_rows, max(k.dim, v.dim), n_groups, n_body + n_tail, splits
    )
    whole = splits == 1
    n_partial = 0 if whole else n_groups * n_rows * splits * v.dim
    output = (batch, n_heads, n_queries, v.dim)
    template = ("T", dtype), *tables.template(layout), ("RAW", tables.RAW[layout.dtype])
    template += ("ROWS", rows), ("CENTRED", anchors is not None), ("WHOLE", whole)
    step = cut.tiles_at_once(rows, v.dim, anchors is not None and k.bits == 8)
    template += ("STEP", step), ("SIMD_GROUPS", cut.simd_groups)
    template += ("KEY_COLUMNS", cut.key_columns), ("LUT_KIB", cut.lut_words // 256)
    template += ("PREFETCH", cut.prefetch), ("HALF2", cut.half2)
    threads = 32 * cut.simd_groups
    partial_options = (
        ("template", template),
        ("grid", (n_groups * threads, splits, -(-n_rows // rows))),
        ("threadgroup", (threads, 1, 1)),
        ("output_shapes", (output if whole else (n_partial + 2 * n_partial // v.dim,),)),
        ("output_dtypes", (dtype if whole else mx.float32,)),
    )
    merge_options = (
        ("template", (("T", dtype), ("VD", v.dim), ("VW", v.width))),
        ("grid", (n_groups * n_rows * MERGE_THREADS, 1, 1)),
        ("threadgroup", (MERGE_THREADS, 1, 1)),
        ("output_shapes", (output,)),
        ("output_dtypes", (dtype,)),
    )
    scale_bits = struct.unpack("<i", struct.pack("<f", scale))[0]
    split_pairs, n_uncentred = anchors or (0, 0)
    params = DecodeParams(
        n_rows=n_rows,
        n_queries=n_queries,
        n_kv_heads=n_kv_heads,
        causal=causal and n_queries > 1,
        body_stride=body_stride,
        body_tiles=n_body // TILE,
        tail_stride=tail_stride,
        n_tokens=n_body + n_tail,
        n_splits=splits,
        has_left_padding=has_padding,
        has_sinks=has_sinks,
        scale=scale_bits,
        opaque_one=1,
        split_pairs=split_pairs,
        n_uncentred=int(n_uncentred),
        stats_offset=n_partial,
    )
    heads = batch, n_kv_heads
    wanted = (
        Input("queries", (batch, n_heads, n_queries, k.dim), dtype),
        tiles_input("body", layout, heads, body_stride),
        tiles_input("tail", layout, heads, tail_stride),
        padding_input(batch) if has_padding else None,
        *(None, None, None),
        *anchor_inputs(layout, heads, anchors is not None, False)[:2],
        Input("sinks", (max(n_heads, 8),), dtype) if has_sinks else None,
    )
    heads = n_heads // n_kv_heads, n_queries
    kernel = Kernel("decode", backend, layout, dtype, anchors is not None, rows, whole, cut, heads)
    require(kernel)
    call = _call(factory, backend, partial_options, None if whole else merge_options, wanted)
    return Launch(
        call, tables.int_array(*map(int, params)), tables.constants(k), tables.constants(v)
    )


@lru_cache(maxsize=64)
def _call(
    factory: Callable | None,
    backend: str,
    partial_options: tuple,
    merge_options: tuple | None,
    wanted: tuple[Input | None, ...],
) -> Callable:
    """The launches as one function of arrays, which are ``wanted``; ``factory`` is in the key."""
    partial = assemble.build(
        "decode_partial", "decode.metal", PARTIAL_INPUTS, ("result",), PARTIAL_SOURCE, backend
    )
    merge = assemble.build(
        "decode_merge", "merge.metal", MERGE_INPUTS, ("output",), MERGE_SOURCE, backend
    )

    def launch(*inputs: mx.array) -> mx.array:
        check_inputs("decode", wanted, inputs)
        (result,) = partial(inputs=list(inputs), **dict(partial_options))
        if merge_options is None:
            return result
        params, v_constants, sinks = inputs[4], inputs[6], inputs[9]
        return merge(inputs=[result, sinks, params, v_constants], **dict(merge_options))[0]

    return assemble.replayed(launch, backend)


def decode(
    queries: mx.array,
    packed: PackedKV,
    scale: float,
    causal: bool = False,
    sinks: mx.array | None = None,
    left_padding: mx.array | None = None,
    *,
    backend: str = "metal",
    splits: int | None = None,
    cut: Tuning | None = None,
) -> mx.array:
    """Attention of at most 8 queries over packed rows, in one launch or two.

    Args:
        causal: the last query sees every row, the one before all but the last, and so on.
        sinks: one logit a query head that takes part in the softmax and has no value.
        left_padding: rows before the first valid one of each sequence; None where there are none.
            Positions of centred keys count from it.
        splits: parts that the tokens of a head are cut into; None: as many as suit their number.
        cut: how the kernel is cut for the GPU; None: as doctor --tune found it best on this
            machine, else as the package has it for the back-end.

    Shapes:
        queries: [B, n_heads, L, k_head_dim]; sinks: [n_heads]; left_padding: [B] int32.
        returns: [B, n_heads, L, v_head_dim], in the queries' dtype.

    Raises:
        ValueError: a shape, type or count does not fit the others.
    """
    layout, body, n_body, tail, n_tail, centre, _ = packed
    batch, n_heads, n_queries, _ = queries.shape
    n_kv_heads = packed.newest.shape[1]
    launch = _launch(
        assemble.factory,
        backend,
        layout,
        queries.dtype,
        (batch, n_heads, n_kv_heads, n_queries),
        (n_body, body.shape[2] if n_body else 0, n_tail, tail.shape[2] if n_tail else 0),
        scale,
        (causal, sinks is not None, left_padding is not None),
        None if centre is None else (centre.rope.split_pairs, centre.first_key_uncentred),
        splits,
        cut or tuned.cut_for(backend, layout, n_heads // n_kv_heads * n_queries, n_body + n_tail),
    )
    return launch.call(
        queries,
        body if n_body else tables.no_tiles(),
        tail if n_tail else tables.no_tiles(),
        tables.padding_input(left_padding),
        launch.params,
        launch.k_constants,
        launch.v_constants,
        *tables.anchor_inputs(centre, n_body + n_tail, None)[:2],
        _sinks(sinks, queries),
    )


def _sinks(sinks: mx.array | None, queries: mx.array) -> mx.array:
    if sinks is None:
        return queries  # never read
    check_sinks("decode", sinks, queries.shape[1])
    if sinks.dtype != queries.dtype:
        sinks = sinks.astype(queries.dtype)
    return tables.at_least_eight(sinks)
