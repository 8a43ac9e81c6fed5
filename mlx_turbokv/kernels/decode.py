"""Launches metal/decode.metal: attention of few queries over packed rows."""

from __future__ import annotations

import struct
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
TKV_SHARED(float4, shared, decode_floats(ROWS, KD, VD) / 4);
decode_partial<T, KB, KG, KD, KW, VB, VG, VD, RAW, ROWS>(
    queries, body, tail, starts, params, k_constants, v_constants, partial, stats, shared,
    {assemble.THREAD});
"""
PARTIAL_INPUTS = ("queries", "body", "tail", "starts", "params", "k_constants", "v_constants")
MERGE_SOURCE = f"""
TKV_SHARED(float4, shared, 2 * VD);
decode_merge<T, VD, VW>(
    partial, stats, sinks, params, v_constants, output, shared, {assemble.THREAD});
"""
MERGE_INPUTS = ("partial", "stats", "sinks", "params", "v_constants")


class Plan(NamedTuple):
    """What the launches need that depends on layout, dtype and query rows alone."""

    rows: int
    chunks: int
    partial_template: list[tuple[str, object]]
    merge_template: list[tuple[str, object]]
    k_constants: mx.array
    v_constants: mx.array


def rows_at_once(n_rows: int, widest: int) -> int:
    """Query rows that one threadgroup takes: as many as registers hold, evenly cut."""
    most = 16 if widest <= 128 else (8 if widest <= 256 else 4)
    return -(-n_rows // -(-n_rows // most))


@lru_cache(maxsize=None)
def _plan(layout: KVLayout, dtype: mx.Dtype, n_rows: int) -> Plan:
    k, v = tables.sides(layout)
    rows = rows_at_once(n_rows, max(k.dim, v.dim))
    partial = [("T", dtype), ("KB", k.bits), ("KG", k.group), ("KD", k.dim), ("KW", k.width)]
    partial += [("VB", v.bits), ("VG", v.group), ("VD", v.dim), ("RAW", tables.RAW[layout.dtype])]
    partial += [("ROWS", rows)]
    merge = [("T", dtype), ("VD", v.dim), ("VW", v.width)]
    chunks = -(-n_rows // rows)
    return Plan(rows, chunks, partial, merge, tables.constants(k), tables.constants(v))


def n_splits(n_tiles: int, n_groups: int) -> int:
    """Into how many splits the tokens of one head are cut."""
    return max(1, min(-(-FULL_WAVE // n_groups), -(-n_tiles // MIN_SPLIT_TILES)))


@lru_cache(maxsize=64)
def _float_bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


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
        starts: the first valid row of each sequence, int32; None where all are valid.

    Shapes:
        queries: [B, n_heads, L, k_head_dim]; sinks: [n_heads]; starts: [B].
        returns: [B, n_heads, L, v_head_dim], in the queries' dtype.
    """
    layout = packed.layout
    batch, n_heads, n_queries, _ = queries.shape
    body, tail = packed.body, packed.tail
    body_stride = body.shape[2] if packed.n_body else 0
    tail_stride = tail.shape[2] if packed.n_tail else 0
    n_kv_heads = (body if packed.n_body else tail).shape[1]
    n_rows = n_heads // n_kv_heads * n_queries
    plan = _plan(layout, queries.dtype, n_rows)
    n_groups = batch * n_kv_heads
    splits = n_splits(-(-packed.n_tokens // TILE), n_groups * plan.chunks)
    params = tables.int_array(
        n_rows,
        n_queries,
        n_kv_heads,
        int(causal and n_queries > 1),
        body_stride,
        packed.n_body // TILE,
        tail_stride,
        packed.n_tokens,
        splits,
        int(starts is not None),
        int(sinks is not None),
        _float_bits(scale),
    )
    partial = assemble.build(
        "decode_partial", "decode.metal", PARTIAL_INPUTS, ("partial", "stats"), PARTIAL_SOURCE, backend
    )
    outputs, stats = partial(
        inputs=[
            queries,
            body if packed.n_body else tables.no_tiles(),
            tail if packed.n_tail else tables.no_tiles(),
            tables.placeholder() if starts is None else tables.at_least_eight(starts),
            params,
            plan.k_constants,
            plan.v_constants,
        ],
        template=plan.partial_template,
        grid=(n_groups * THREADS, splits, plan.chunks),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(n_groups * n_rows, splits, layout.v_head_dim), (n_groups * n_rows, splits, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    merge = assemble.build(
        "decode_merge", "decode.metal", MERGE_INPUTS, ("output",), MERGE_SOURCE, backend
    )
    return merge(
        inputs=[
            outputs,
            stats if stats.size >= 8 else tables.at_least_eight(stats.reshape(-1)),
            _sinks(sinks, queries),
            params,
            plan.v_constants,
        ],
        template=plan.merge_template,
        grid=(n_groups * n_rows * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(batch, n_heads, n_queries, layout.v_head_dim)],
        output_dtypes=[queries.dtype],
    )[0]


def _sinks(sinks: mx.array | None, queries: mx.array) -> mx.array:
    if sinks is None:
        return queries  # never read
    if sinks.dtype != queries.dtype:
        sinks = sinks.astype(queries.dtype)
    return tables.at_least_eight(sinks)
