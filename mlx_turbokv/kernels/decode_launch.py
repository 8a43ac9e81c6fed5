"""The launches of metal/decode.metal and merge.metal: text, template values and parameters."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from ..quant.layout import TILE, KVLayout, protected_layout
from . import assemble, tables, tuning
from .assemble import Launch
from .checks import (
    Input,
    anchor_inputs,
    check_counts,
    check_heads,
    check_inputs,
    check_segments,
    padding_input,
    tiles_input,
)
from .splits import Segments
from .trust import Kernel, require
from .tuning import Tuning

MERGE_THREADS = 256
READS_REST, READS_BODY = 1, 2  # of metal/decode_config.h
_TENSORS = "T, Tensor<KB, KG, KD, KW>, Tensor<VB, VG, VD, VW>, RAW, ROWS, CENTRED, WHOLE"
_TUNING = "SIMD_GROUPS, KEY_COLUMNS, LUT_KIB, PREFETCH, HALF2"
_INPUTS = """queries, body, tail, left_padding, (const device DecodeParams*)params, k_constants,
    v_constants, centre, cos_sin_table, sinks"""
PARTIAL_SOURCE = f"""
typedef DecodeConfig<{_TENSORS}, STEP, {_TUNING}, READS_ALL, 1> Config;
TKV_SHARED_ALIGNED(float4, shared, DecodeMemory<Config>::END / 4);
const DecodeInputs<T> inputs = {{
    {_INPUTS}}};
decode_partial<Config>(inputs, result, shared, {assemble.THREAD});
"""
_PROTECTED = _TENSORS.replace("KB, KG", "PKB, PKG").replace("VB, VG", "PVB, PVG")
PROTECTED_SOURCE = f"""
typedef DecodeConfig<{_TENSORS}, STEP, {_TUNING}, READS, 1> Body;
typedef DecodeConfig<{_PROTECTED}, P_STEP, {_TUNING}, READS_PROTECTED,
                     Body::PARTS> Protected;
TKV_SHARED_ALIGNED(float4, shared,
                   larger(DecodeMemory<Body>::END, DecodeMemory<Protected>::END) / 4);
const DecodeInputs<T> inputs = {{
    {_INPUTS},
    first_tokens, params + DECODE_PARAMS}};
decode_protected<Body, Protected>(inputs, result, shared, {assemble.THREAD});
"""
PARTIAL_INPUTS = ("queries", "body", "tail", "left_padding", "params", "k_constants")
PARTIAL_INPUTS += ("v_constants", *tables.ANCHOR_INPUTS[:2], "sinks")
PROTECTED_INPUTS = (*PARTIAL_INPUTS, "first_tokens")
MERGE_SOURCE = f"""
TKV_SHARED(float4, shared, 2 * VD);
decode_merge<T, VD, VW>(
    partial, sinks, params, v_constants, output, shared, {assemble.THREAD});
"""
MERGE_INPUTS = ("partial", "sinks", "params", "v_constants")


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
    n_sunk: int = 0
    first_tiles: int = 0
    first_stride: int = 0
    tail_start: int = 0
    body_splits: int = 0
    protected_split: int = 0
    spared_tiles: int = 0
    body_end: int = -1


@lru_cache(maxsize=256)
def launch_for(
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
    segments: Segments | None = None,
) -> Launch:
    """
    Args:
        factory: that of assemble.py; a part of the key.
        shape: sequences, query heads, KV heads, queries.
        counts: body rows, tiles of the body's buffer, tail rows, tiles of the tail's buffer.
        flags: causal, sinks, left padding.
        anchors: of centred keys: pairs of dims that lie apart, whether first keys are bare.
        splits: those of a head; None: as the tuning says.
        segments: of protected rows.
    """
    k, v = tables.tensor_parameters(layout)
    batch, n_heads, n_kv_heads, n_queries = shape
    n_body, body_stride, n_tail, tail_stride = counts
    check_counts("decode", *counts)
    check_heads("decode", n_heads, n_kv_heads, n_queries)
    causal, has_sinks, has_padding = flags
    n_tokens = n_tail + (n_body if segments is None else segments.tail_start)
    n_rows = n_heads // n_kv_heads * n_queries
    n_groups = batch * n_kv_heads
    rows, splits = tuning.rows_and_splits(
        cut, backend, n_rows, max(k.dim, v.dim), n_groups, n_tokens, splits
    )
    whole = splits == 1
    n_partial = 0 if whole else n_groups * n_rows * splits * v.dim
    output = (batch, n_heads, n_queries, v.dim)
    steps = _steps(cut, rows, layout, anchors is not None)
    template = _template(layout, dtype, rows, anchors is not None, whole, cut, segments, steps)
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
    split_pairs, n_uncentred = anchors or (0, 0)
    params = DecodeParams(
        n_rows=n_rows,
        n_queries=n_queries,
        n_kv_heads=n_kv_heads,
        causal=causal and n_queries > 1,
        body_stride=body_stride,
        body_tiles=n_body // TILE,
        tail_stride=tail_stride,
        n_tokens=n_tokens,
        n_splits=splits,
        has_left_padding=has_padding,
        has_sinks=has_sinks,
        scale=struct.unpack("<i", struct.pack("<f", scale))[0],
        opaque_one=1,
        split_pairs=split_pairs,
        n_uncentred=int(n_uncentred),
        stats_offset=n_partial,
    )
    heads = batch, n_kv_heads
    fine = layout if segments is None else protected_layout(layout)
    tail_layout = fine if segments is None or segments.tail_protected else layout
    wanted: tuple[Input | None, ...] = (
        Input("queries", (batch, n_heads, n_queries, k.dim), dtype),
        tiles_input("body", layout, heads, body_stride),
        tiles_input("tail", tail_layout, heads, tail_stride),
        padding_input(batch) if has_padding else None,
        *(None, None, None),
        *anchor_inputs(layout, heads, anchors is not None, False)[:2],
        Input("sinks", (max(n_heads, 8),), dtype) if has_sinks else None,
    )
    if segments is not None:
        own_ends = set(segments.body_ends)
        check_segments("decode", batch, n_body, n_tokens, *segments[:5])
        if not whole:
            params = params._replace(
                **segments.shared_out(n_tokens, splits, cut.simd_groups, steps)._asdict()
            )
        params = params._replace(
            n_sunk=segments.n_sunk,
            first_tiles=segments.first_tiles,
            first_stride=segments.first_stride,
            tail_start=segments.tail_start if segments.tail_protected else n_tokens,
            body_end=-1 if len(own_ends) > 1 else own_ends.pop(),
        )
        wanted += (tiles_input("first tokens", fine, heads, segments.first_stride),)
    heads = n_heads // n_kv_heads, n_queries
    require(
        Kernel(
            "decode", backend, layout, dtype, anchors is not None, rows, whole, cut, heads,
            protected=None if segments is None else segments.tail_protected,
        )
    )  # fmt: skip
    call = _call(factory, backend, partial_options, None if whole else merge_options, wanted)
    ends = () if segments is None else segments.body_ends
    numbers = tables.int_array(*map(int, params), *ends)
    return Launch(call, numbers, tables.constants(k), tables.constants(v))


def _steps(cut: Tuning, rows: int, layout: KVLayout, centred: bool) -> tuple[int, int]:
    """Tiles that a SIMD group handles at a time: of ``layout``, and of protected rows."""
    found = []
    for own, protected in ((layout, False), (protected_layout(layout), True)):
        k, v = tables.tensor_parameters(own)
        found.append(cut.tiles_at_once(rows, v.dim, centred and k.bits == 8, protected=protected))
    return found[0], found[1]


def _template(
    layout: KVLayout, dtype: mx.Dtype, rows: int, centred: bool, whole: bool, cut: Tuning,
    segments: Segments | None, steps: tuple[int, int],
) -> tuple[tuple[str, object], ...]:  # fmt: skip
    """Template values of decode_partial, or of decode_protected."""
    template: tuple[tuple[str, object], ...] = (
        ("T", dtype), *tables.template(layout), ("RAW", tables.RAW[layout.dtype]), ("ROWS", rows),
        ("CENTRED", centred), ("WHOLE", whole), ("STEP", steps[0]),
        ("SIMD_GROUPS", cut.simd_groups), ("KEY_COLUMNS", cut.key_columns),
        ("LUT_KIB", cut.lut_words // 256), ("PREFETCH", cut.prefetch), ("HALF2", cut.half2),
    )  # fmt: skip
    if segments is None:
        return template
    k, v = tables.tensor_parameters(protected_layout(layout))
    reads = READS_BODY if segments.tail_protected else READS_REST
    own = ("PKB", k.bits), ("PKG", k.group), ("PVB", v.bits), ("PVG", v.group), ("P_STEP", steps[1])
    return (*template, ("READS", reads), *own)


@lru_cache(maxsize=64)
def _call(
    factory: Callable | None,
    backend: str,
    partial_options: tuple,
    merge_options: tuple | None,
    wanted: tuple[Input | None, ...],
) -> Callable:
    """The launches as one function of arrays, which are ``wanted``; ``factory`` is in the key."""
    name, names, source = "decode_partial", PARTIAL_INPUTS, PARTIAL_SOURCE
    if len(wanted) > len(PARTIAL_INPUTS):
        name, names, source = "decode_protected", PROTECTED_INPUTS, PROTECTED_SOURCE
    partial = assemble.build(name, "decode.metal", names, ("result",), source, backend)
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
