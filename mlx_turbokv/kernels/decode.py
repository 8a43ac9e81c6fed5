"""Attention of few queries over packed rows, by the kernels of metal/decode.metal."""

from __future__ import annotations

import mlx.core as mx

from ..quant.layout import TILE
from . import assemble, tables, tuned
from .checks import check_sinks
from .decode_launch import Segments, launch_for
from .segments import AnyKV, SegmentedKV
from .tuning import Tuning

MAX_QUERIES = 8


def decode(
    queries: mx.array,
    packed: AnyKV,
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
    body, n_body, tail, n_tail = packed.body, packed.n_body, packed.tail, packed.n_tail
    segments, n_tokens, centre = _segments(packed), packed.n_tokens, packed.centre
    batch, n_heads, n_queries, _ = queries.shape
    n_kv_heads = packed.newest.shape[1]
    launch = launch_for(
        assemble.factory,
        backend,
        packed.layout,
        queries.dtype,
        (batch, n_heads, n_kv_heads, n_queries),
        (n_body, body.shape[2] if n_body else 0, n_tail, tail.shape[2] if n_tail else 0),
        scale,
        (causal, sinks is not None, left_padding is not None),
        None if centre is None else (centre.rope.split_pairs, centre.first_key_uncentred),
        splits,
        cut or tuned.cut_for(backend, packed.layout, n_heads // n_kv_heads * n_queries, n_tokens),
        segments,
    )
    given = [
        queries,
        body if n_body else tables.no_tiles(),
        tail if n_tail else tables.no_tiles(),
        tables.padding_input(left_padding),
        launch.params,
        launch.k_constants,
        launch.v_constants,
        *tables.anchor_inputs(centre, n_tokens, None)[:2],
        _sinks(sinks, queries),
    ]
    if isinstance(packed, SegmentedKV):
        given.append(packed.sink if packed.n_sink else tables.no_tiles())
    return launch.call(*given)


def _segments(packed: AnyKV) -> Segments | None:
    """What the launch depends on of protected rows."""
    if not isinstance(packed, SegmentedKV):
        return None
    if packed.fresh is not None:
        raise ValueError("[decode] rows that are not packed cannot be read.")
    stride = packed.sink.shape[2] if packed.n_sink else 0
    sunk, first_tiles = packed.n_sunk, packed.n_sink // TILE
    fine = packed.tail_layout == packed.sink_layout
    return Segments(sunk, first_tiles, stride, packed.tail_start, packed.coarse_end, fine)


def _sinks(sinks: mx.array | None, queries: mx.array) -> mx.array:
    if sinks is None:
        return queries  # never read
    check_sinks("decode", sinks, queries.shape[1])
    if sinks.dtype != queries.dtype:
        sinks = sinks.astype(queries.dtype)
    return tables.at_least_eight(sinks)
