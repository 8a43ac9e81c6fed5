"""The reference back-end: packing and attention in plain mx ops, on any machine MLX runs on.

The kernels are held against these functions; they share their signatures.
"""

from __future__ import annotations

import mlx.core as mx

from ..centring.centre import Centre
from ..quant import quantize
from ..quant.layout import TILE, KVLayout
from ..quant.tiles import Rows, first_rows_mask, padded, rows_to_tiles, tiles_to_rows
from .packed import PackedKV, heads_at_once

# dequantised K and V of one attention call are kept below this by taking KV heads in slices
TRANSIENT_BYTES = 128 * 2**20
scaled_dot_product_attention = mx.fast.scaled_dot_product_attention


def pack(
    keys: mx.array,
    values: mx.array,
    layout: KVLayout,
    tail: mx.array | None = None,
    n_tail: int = 0,
    centre: Centre | None = None,
    first: int = 0,
    padding: tuple[int, ...] | None = None,
) -> mx.array:
    """Quantise new tokens and append them to the tail.

    Args:
        tail: packed rows that the new ones follow; None where there are none.
        n_tail: how many rows of the tail are kept.
        centre: what is taken out of the keys; its rows begin with ``first``, the sequences' own
            positions after ``padding`` rows.

    Shapes:
        keys, values: [B, H, L, k_head_dim or v_head_dim].
        tail: [B, H, T, layout.tile_words] uint32.
        returns: [B, H, ceil((n_tail + L) / 32), layout.tile_words] uint32.
    """
    n_full, n_partial = divmod(n_tail, TILE)
    if centre is not None:
        keys = keys.astype(mx.float32) - centre.rows(first, keys.shape[2], padding)
    k = quantize.quantize(keys, layout.k_format)
    v = quantize.quantize(values, layout.v_format)
    rows = Rows(*k, *v)
    if n_partial:
        rows = padded(rows, n_partial, 0)
    tiles = rows_to_tiles(rows, layout)
    if n_tail == 0:
        return tiles
    if n_partial:
        kept = tail[:, :, n_full : n_full + 1] & first_rows_mask(layout, n_partial)
        tiles = mx.concatenate([kept | tiles[:, :, :1], tiles[:, :, 1:]], axis=2)
    return mx.concatenate([tail[:, :, :n_full], tiles], axis=2) if n_full else tiles


def attention(
    queries: mx.array,
    packed: PackedKV,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    starts: mx.array | None = None,
) -> mx.array:
    """Scaled dot-product attention over packed rows, in float32.

    Args:
        mask: None, "causal" (the last query sees every row), or a bool or additive array.
        sinks: one logit a query head that takes part in the softmax and has no value.
        starts: the first valid row of each sequence, int32.

    Shapes:
        queries: [B, n_heads, L, k_head_dim]; starts: [B].
        returns: [B, n_heads, L, v_head_dim], in the queries' dtype.
    """
    layout = packed.layout
    n_heads, n_kv_heads = queries.shape[1], _any(packed).shape[1]
    gqa_factor = n_heads // n_kv_heads
    q = queries.astype(mx.float32)
    if layout.k_format.is_turbo:
        q = quantize.rotate(q, layout.k_head_dim)
    if starts is not None:
        mask = with_starts(queries.shape[2], packed.n_tokens, mask, starts)
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(mx.float32)
    sinks = None if sinks is None else sinks.astype(mx.float32)
    tiles = packed.tiles
    row_bytes = _transient_bytes_per_head(packed, queries.shape[0])
    step = heads_at_once(n_kv_heads, row_bytes, TRANSIENT_BYTES)

    outputs = []
    for first in range(0, n_kv_heads, step):
        keys, values = _rotated(tiles[:, first : first + step], packed, first)
        heads = slice(first * gqa_factor, (first + step) * gqa_factor)
        per_head = isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1
        output = scaled_dot_product_attention(
            q[:, heads],
            keys,
            values,
            scale=scale,
            mask=mask[..., heads, :, :] if per_head else mask,
            sinks=None if sinks is None else sinks[heads],
        )
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
    if layout.v_format.is_turbo:
        output = quantize.rotate(output, layout.v_head_dim, inverse=True)
    return output.astype(queries.dtype)


def with_starts(
    n_queries: int, n_tokens: int, mask: mx.array | str | None, starts: mx.array
) -> mx.array:
    """One mask of the first valid rows and of ``mask``; bool unless ``mask`` is additive."""
    tokens = mx.arange(n_tokens)
    seen = (tokens[None] >= starts[:, None])[:, None, None]
    if mask is None:
        return seen
    if isinstance(mask, str):
        queries = mx.arange(n_tokens - n_queries, n_tokens)
        return seen & (tokens[None] <= queries[:, None])
    if mask.dtype == mx.bool_:
        return seen & mask
    return mx.where(seen, mask, -mx.inf)


def dequantize(packed: PackedKV, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """K and V as the model would have made them, quantisation error aside.

    Shapes:
        returns: [B, H, n, k_head_dim] and [B, H, n, v_head_dim] in ``dtype``.
    """
    layout = packed.layout
    keys, values = _rotated(packed.tiles, packed)
    if layout.k_format.is_turbo:
        keys = quantize.rotate(keys, layout.k_head_dim, inverse=True)
    if layout.v_format.is_turbo:
        values = quantize.rotate(values, layout.v_head_dim, inverse=True)
    return keys.astype(dtype), values.astype(dtype)


def _any(packed: PackedKV) -> mx.array:
    return packed.body if packed.body is not None else packed.tail


def _rotated(tiles: mx.array, packed: PackedKV, first_head: int = 0) -> tuple[mx.array, mx.array]:
    """Dequantised rows of tiles, turbo rows in the rotated basis, float32."""
    layout, n = packed.layout, packed.n_tokens
    dtype = getattr(mx, layout.dtype)
    rows = Rows(*(part[:, :, :n] for part in tiles_to_rows(tiles, layout)))
    keys = quantize.values(rows.k, rows.k_scales, layout.k_format, layout.k_head_dim, dtype)
    if packed.centre is not None:
        anchors = packed.centre.rows(
            0, n, packed.padding, lambda x: quantize.rotate(x, layout.k_head_dim)
        )
        keys = keys + anchors[:, first_head : first_head + keys.shape[1]]
    values = quantize.values(rows.v, rows.v_scales, layout.v_format, layout.v_head_dim, dtype)
    return keys, values


def _transient_bytes_per_head(packed: PackedKV, batch: int) -> int:
    layout = packed.layout
    return 4 * batch * packed.n_tokens * (layout.k_head_dim + layout.v_head_dim)
