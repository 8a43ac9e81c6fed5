"""Launches metal/decode.metal: attention of few queries over packed rows."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..layout import TILE, KVLayout
from . import assemble, tables
from .packed import PackedKV

MAX_QUERIES = 8
THREADS = 256
# threadgroups that fill a large GPU, and the fewest tiles worth a split
FULL_WAVE = 264
MIN_SPLIT_TILES = 4

PARTIAL_SOURCE = f"""
TKV_SHARED_ALIGNED(float4, shared, decode_words(KB, KD, VB, VG, VD, ROWS, RAW, CENTRED) / 4);
decode_partial<T, KB, KG, KD, KW, VB, VG, VD, RAW, ROWS, CENTRED>(
    queries, body, tail, starts, params, k_constants, v_constants, mu, table, partial, stats,
    shared, {assemble.THREAD});
"""
PARTIAL_INPUTS = ("queries", "body", "tail", "starts", "params", "k_constants", "v_constants")
PARTIAL_INPUTS += tables.ANCHOR_INPUTS[:2]
MERGE_SOURCE = f"""
TKV_SHARED(float4, shared, 2 * VD);
decode_merge<T, VD, VW>(
    partial, stats, sinks, params, v_constants, output, shared, {assemble.THREAD});
"""
MERGE_INPUTS = ("partial", "stats", "sinks", "params", "v_constants")


class Launch(NamedTuple):
    """The two kernels as one call on arrays, and its parameters: the same for a step's layers."""

    call: Callable
    params: mx.array
    k_constants: mx.array
    v_constants: mx.array


def rows_at_once(n_rows: int, widest: int, centred: bool = False) -> int:
    """Query rows that one threadgroup takes: as many as registers hold, evenly cut.

    Sixteen rows of 128 dims leave no threadgroup memory for what queries and anchors give.
    """
    most = 16 if widest <= 128 else (8 if widest <= 256 else 4)
    if centred and widest > 64:
        most = min(most, 8)
    return -(-n_rows // -(-n_rows // most))


def n_splits(n_tiles: int, n_groups: int) -> int:
    """Into how many splits the tokens of one head are cut."""
    return max(1, min(-(-FULL_WAVE // n_groups), -(-n_tiles // MIN_SPLIT_TILES)))


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
) -> Launch:
    """
    Args:
        factory: that of assemble.py; a part of the key.
        shape: sequences, query heads, KV heads, queries.
        counts: body rows, tiles of the body's buffer, tail rows, tiles of the tail's buffer.
        flags: causal, sinks, starts.
        anchors: of centred keys: pairs of dims that lie apart, whether first keys are bare.
    """
    k, v = tables.sides(layout)
    batch, n_heads, n_kv_heads, n_queries = shape
    n_body, body_stride, n_tail, tail_stride = counts
    causal, has_sinks, has_starts = flags
    n_rows = n_heads // n_kv_heads * n_queries
    rows = rows_at_once(n_rows, max(k.dim, v.dim), anchors is not None)
    chunks = -(-n_rows // rows)
    n_groups = batch * n_kv_heads
    splits = n_splits(-(-(n_body + n_tail) // TILE), n_groups * chunks)
    template = *tables.template(layout, dtype), ("ROWS", rows), ("CENTRED", anchors is not None)
    partial_options = (
        ("template", template),
        ("grid", (n_groups * THREADS, splits, chunks)),
        ("threadgroup", (THREADS, 1, 1)),
        ("output_shapes", ((n_groups * n_rows, splits, v.dim), (n_groups * n_rows, splits, 2))),
        ("output_dtypes", (mx.float32, mx.float32)),
    )
    merge_options = (
        ("template", (("T", dtype), ("VD", v.dim), ("VW", v.width))),
        ("grid", (n_groups * n_rows * THREADS, 1, 1)),
        ("threadgroup", (THREADS, 1, 1)),
        ("output_shapes", ((batch, n_heads, n_queries, v.dim),)),
        ("output_dtypes", (dtype,)),
    )
    scale_bits = struct.unpack("<i", struct.pack("<f", scale))[0]
    params = tables.int_array(
        n_rows,
        n_queries,
        n_kv_heads,
        int(causal and n_queries > 1),
        body_stride,
        n_body // TILE,
        tail_stride,
        n_body + n_tail,
        splits,
        int(has_starts),
        int(has_sinks),
        scale_bits,
        1,
        *(int(x) for x in anchors or (0, 0)),
    )
    call = _call(factory, backend, partial_options, merge_options, (body_stride, tail_stride))
    return Launch(call, params, tables.constants(k), tables.constants(v))


@lru_cache(maxsize=64)
def _call(
    factory: Callable | None,
    backend: str,
    partial_options: tuple,
    merge_options: tuple,
    strides: tuple[int, int],
) -> Callable:
    """Both launches as one function of arrays; ``factory`` and ``strides`` are parts of the key."""
    names = ("partial", "stats")
    partial = assemble.build(
        "decode_partial", "decode.metal", PARTIAL_INPUTS, names, PARTIAL_SOURCE, backend
    )
    merge = assemble.build(
        "decode_merge", "merge.metal", MERGE_INPUTS, ("output",), MERGE_SOURCE, backend
    )

    def launch(sinks: mx.array, *inputs: mx.array) -> mx.array:
        outputs, stats = partial(inputs=list(inputs), **dict(partial_options))
        if stats.size < 8:
            stats = tables.at_least_eight(stats.reshape(-1))
        params, v_constants = inputs[4], inputs[6]
        return merge(
            inputs=[outputs, stats, sinks, params, v_constants], **dict(merge_options)
        )[0]

    return assemble.replayed(launch, backend)


def decode(
    queries: mx.array,
    packed: PackedKV,
    scale: float,
    causal: bool = False,
    sinks: mx.array | None = None,
    starts: mx.array | None = None,
    *,
    backend: str = "metal",
) -> mx.array:
    """Attention of at most 8 queries over packed rows, in two launches.

    Args:
        causal: the last query sees every row, the one before all but the last, and so on.
        sinks: one logit a query head that takes part in the softmax and has no value.
        starts: the first valid row of each sequence, int32; None where all are valid. Positions
            of centred keys count from it.

    Shapes:
        queries: [B, n_heads, L, k_head_dim]; sinks: [n_heads]; starts: [B].
        returns: [B, n_heads, L, v_head_dim], in the queries' dtype.
    """
    layout, body, n_body, tail, n_tail, centre, _ = packed
    batch, n_heads, n_queries, _ = queries.shape
    launch = _launch(
        assemble.factory,
        backend,
        layout,
        queries.dtype,
        (batch, n_heads, (body if n_body else tail).shape[1], n_queries),
        (n_body, body.shape[2] if n_body else 0, n_tail, tail.shape[2] if n_tail else 0),
        scale,
        (causal, sinks is not None, starts is not None),
        None if centre is None else (centre.turning.half, centre.bare_first),
    )
    return launch.call(
        _sinks(sinks, queries),
        queries,
        body if n_body else tables.no_tiles(),
        tail if n_tail else tables.no_tiles(),
        tables.placeholder() if starts is None else tables.at_least_eight(starts),
        launch.params,
        launch.k_constants,
        launch.v_constants,
        *tables.anchor_inputs(centre, n_body + n_tail, None)[:2],
    )


def _sinks(sinks: mx.array | None, queries: mx.array) -> mx.array:
    if sinks is None:
        return queries  # never read
    if sinks.dtype != queries.dtype:
        sinks = sinks.astype(queries.dtype)
    return tables.at_least_eight(sinks)
