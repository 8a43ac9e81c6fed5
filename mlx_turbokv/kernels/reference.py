"""The reference back-end: packing and attention in plain mx ops, on any machine MLX runs on.

The kernels are tested against these functions; they share their signatures.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..centring.centre import Centre
from ..quant import quantize
from ..quant.formats import KVFormat
from ..quant.layout import TILE, KVLayout
from ..quant.rotate import rotate
from ..quant.tiles import Rows, first_rows_mask, padded, rows_to_tiles, tiles_to_rows
from .checks import (
    Input,
    check_heads,
    check_inputs,
    check_new_rows,
    check_packed,
    check_padding,
    check_part,
)
from .heads import attention_by_heads
from .packed import PackedKV
from .segments import (
    AnyKV,
    SegmentedKV,
    all_rows,
    dequantized,
    scales_of,
)


def pack(
    keys: mx.array,
    values: mx.array,
    layout: KVLayout,
    tail: mx.array | None = None,
    n_tail: int = 0,
    centre: Centre | None = None,
    first: int = 0,
    left_padding: mx.array | None = None,
    rotated: bool = False,
    part: tuple[int, int] | None = None,
) -> mx.array:
    """Quantise new tokens and append them to the tail.

    Args:
        tail: packed rows that the new ones follow; it is not read if ``n_tail`` is 0.
        n_tail: how many rows of the tail are kept.
        centre: what the keys are multiplied by, if anything, and what is then subtracted.
        first: the new tokens' first row in the sequence, for ``centre``.
        left_padding: rows before position 0 of each sequence; None where there are none.
        rotated: turbo rows are in the rotated basis already, and centred.
        part: which of the new tokens are packed, as in pack.py; None: all.

    Shapes:
        keys, values: [B, H, L, k_head_dim or v_head_dim].
        tail: [B, H, T, layout.tile_words] uint32; left_padding: [B] int32.
        returns: [B, H, ceil((n_tail + packed) / 32), layout.tile_words] uint32.
    """
    check_new_rows("pack", layout, keys, values, tail, n_tail, centre, left_padding)
    if part is not None:
        start, stop = part
        check_part("pack", part, keys.shape[2], n_tail)
        keys, values, first = keys[:, :, start:stop], values[:, :, start:stop], first + start
    n_full, n_partial = divmod(n_tail, TILE)
    if centre is not None:
        keys = centre.scaled(keys) - centre.rows(first, keys.shape[2], left_padding)
    rows = Rows(
        *_quantized(keys, layout.k_format, rotated), *_quantized(values, layout.v_format, rotated)
    )
    if n_partial:
        rows = padded(rows, n_partial, 0)
    tiles = rows_to_tiles(rows, layout)
    if tail is None or n_tail == 0:
        return tiles
    if n_partial:
        kept = tail[:, :, n_full : n_full + 1] & first_rows_mask(layout, n_partial)
        tiles = mx.concatenate([kept | tiles[:, :, :1], tiles[:, :, 1:]], axis=2)
    return mx.concatenate([tail[:, :, :n_full], tiles], axis=2) if n_full else tiles


def _quantized(x: mx.array, fmt: KVFormat, rotated: bool) -> tuple[mx.array, mx.array]:
    """Units and scales of rows."""
    if rotated and fmt.is_turbo:
        return quantize.quantize_rotated(quantize.bounded(x).astype(mx.float32), fmt)
    return quantize.quantize(x, fmt)


def attention(
    queries: mx.array,
    packed: AnyKV,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    left_padding: mx.array | None = None,
) -> mx.array:
    """Scaled dot-product attention over packed rows, in float32.

    Args:
        mask: None, "causal" (the last query sees every row), or a bool or additive array.
        sinks: one logit a query head that takes part in the softmax and has no value.
        left_padding: rows before the first valid one of each sequence.

    Shapes:
        queries: [B, n_heads, L, k_head_dim]; left_padding: [B] int32.
        returns: [B, n_heads, L, v_head_dim], in the queries' dtype.
    """
    layout = packed.layout
    batch, n_kv_heads = _heads(packed)
    check_heads("attention", queries.shape[1], n_kv_heads, queries.shape[2])
    shape = batch, *queries.shape[1:3], layout.k_head_dim
    check_inputs("attention", [Input("queries", shape, queries.dtype)], [queries])
    check_padding("attention", left_padding, batch)
    q = queries.astype(mx.float32)
    if (scales := scales_of(packed)) is not None:
        q = scales.unscaled(q)
    if layout.k_format.is_turbo:
        q = rotate(q, layout.k_head_dim)
    if left_padding is not None:
        mask = with_left_padding(queries.shape[2], packed.n_tokens, mask, left_padding)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(mx.float32)
    sinks = None if sinks is None else sinks.astype(mx.float32)
    output = attention_by_heads(
        q,
        _rows_of(packed),
        n_kv_heads,
        4 * packed.row_values(queries.shape[0]),
        scale,
        mask,
        sinks,
    )
    if layout.v_format.is_turbo:
        output = rotate(output, layout.v_head_dim, inverse=True)
    return output.astype(queries.dtype)


def with_left_padding(
    n_queries: int, n_tokens: int, mask: mx.array | str | None, left_padding: mx.array
) -> mx.array:
    """``mask`` that also hides the left padding; bool unless ``mask`` is additive."""
    tokens = mx.arange(n_tokens)
    seen = (tokens[None] >= left_padding[:, None])[:, None, None]
    if mask is None:
        return seen
    if isinstance(mask, str):
        queries = mx.arange(n_tokens - n_queries, n_tokens)
        return seen & (tokens[None] <= queries[:, None])
    if mask.dtype == mx.bool_:
        return seen & mask
    return mx.where(seen, mask, -mx.inf)


def _heads(packed: AnyKV) -> tuple[int, int]:
    """Sequences and KV heads of rows, checked whole where they are not made here."""
    if isinstance(packed, SegmentedKV):
        batch, n_heads = packed.newest.shape[:2]
        return batch, n_heads
    return check_packed("attention", packed)


def _rows_of(packed: AnyKV) -> Callable[[int, int], tuple[mx.array, mx.array]]:
    """Makes the rows of ``count`` KV heads from ``first`` on, in the rotated basis."""
    if isinstance(packed, SegmentedKV):
        return lambda first, count: rotated_rows(packed, mx.float32, first, count)
    tiles = packed.tiles
    return lambda first, count: _rotated(tiles[:, first : first + count], packed, first)


def dequantize(packed: AnyKV, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """K and V as the model would have made them, quantisation error aside.

    Rows that are not packed yet are exact.

    Shapes:
        returns: [B, H, n, k_head_dim] and [B, H, n, v_head_dim] in ``dtype``.
    """
    if isinstance(packed, SegmentedKV):
        return dequantized(packed, dtype, rotated_rows)
    layout = packed.layout
    check_packed("dequantize", packed)
    keys, values = _rotated(packed.tiles, packed)
    if layout.k_format.is_turbo:
        keys = rotate(keys, layout.k_head_dim, inverse=True)
    if (scales := scales_of(packed)) is not None:
        keys = scales.unscaled(keys)
    if layout.v_format.is_turbo:
        values = rotate(values, layout.v_head_dim, inverse=True)
    return keys.astype(dtype), values.astype(dtype)


def rotated_rows(
    packed: AnyKV, dtype: mx.Dtype, first: int, count: int
) -> tuple[mx.array, mx.array]:
    """Rows of KV heads ``first`` to ``first + count``, turbo rows in the rotated basis.

    Keys that have scales are times these.

    Shapes:
        returns: [B, count, n, k_head_dim] and [B, count, n, v_head_dim] in ``dtype``.
    """
    if isinstance(packed, SegmentedKV):
        return all_rows(packed, (first, count), _segment, dtype)
    return _segment(packed, dtype, first, count)


def _segment(
    packed: PackedKV, dtype: mx.Dtype, first: int, count: int, room: int = 0, row: int = 0
) -> tuple[mx.array, mx.array]:
    """The same of rows of one layout.

    Args:
        room: rows of zeros after the last.
        row: which row of the sequence the first is, for centred keys.

    Shapes:
        returns: [B, count, n + room, k_head_dim] and [B, count, n + room, v_head_dim] in ``dtype``.
    """
    keys, values = _rotated(packed.tiles[:, first : first + count], packed, first, row)
    keys, values = keys.astype(dtype), values.astype(dtype)
    if not room:  # a pad of nothing copies
        return keys, values
    widths = [(0, 0), (0, 0), (0, room), (0, 0)]
    return mx.pad(keys, widths), mx.pad(values, widths)


def _rotated(
    tiles: mx.array, packed: PackedKV, first_head: int = 0, row: int = 0
) -> tuple[mx.array, mx.array]:
    """Dequantised rows of tiles, turbo rows in the rotated basis, float32."""
    layout, n = packed.layout, packed.n_tokens
    dtype = getattr(mx, layout.dtype)
    rows = Rows(*(part[:, :, :n] for part in tiles_to_rows(tiles, layout)))
    keys = quantize.values(rows.k, rows.k_scales, layout.k_format, layout.k_head_dim, dtype)
    if packed.centre is not None:
        anchors = packed.centre.rows(
            row, n, packed.left_padding, lambda x: rotate(x, layout.k_head_dim)
        )
        keys = keys + anchors[:, first_head : first_head + keys.shape[1]]
    values = quantize.values(rows.v, rows.v_scales, layout.v_format, layout.v_head_dim, dtype)
    return keys, values
