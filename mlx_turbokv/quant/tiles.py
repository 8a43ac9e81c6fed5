"""Converts rows to tiles and back: the stored layout of layout.py in MLX operations.

A row here is its *units*: integers that hold 1 to 4 packed codes, as many as stay together in both
K's and V's layout. A layout operation moves units and scales, so nothing is
quantised twice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .formats import KVFormat
from .layout import TILE, VEC4, KVLayout

# bits of a code: (bits of a unit, codes in a unit)
UNITS = {
    2: (8, 4),
    3: (12, 4),
    4: (8, 2),
    5: (10, 2),
    6: (12, 2),
    8: (8, 1),
    16: (16, 1),
    32: (32, 1),
}
_BY_SIZE = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
_WORD = {8: mx.uint8, 10: mx.uint16, 12: mx.uint16, 16: mx.uint16, 32: mx.uint32}


class Rows(NamedTuple):
    """Packed rows of K and V, token after token.

    Shapes:
        k, v: [B, H, n, units in a row] uint8, uint16 or uint32.
        k_scales, v_scales: [B, H, n, groups in a row] float16; no groups for f16.
    """

    k: mx.array
    k_scales: mx.array
    v: mx.array
    v_scales: mx.array


def code_bits(fmt: KVFormat, itemsize: int) -> int:
    """Bits of one stored value: those of a code, or of the model's dtype for f16."""
    return 8 * itemsize if fmt.is_f16 else fmt.bits


def units_from_codes(codes: mx.array, bits: int) -> mx.array:
    """Join codes into units.

    Shapes:
        codes: [..., D] unsigned.
        returns: [..., D / codes in a unit].
    """
    unit_bits, per_unit = UNITS[bits]
    if per_unit == 1:
        return codes
    shifts = mx.arange(per_unit, dtype=mx.uint16) * bits
    parts = codes.astype(mx.uint16).reshape(*codes.shape[:-1], -1, per_unit)
    return (parts << shifts).sum(axis=-1).astype(_WORD[unit_bits])


def padded(rows: Rows, before: int, after: int) -> Rows:
    """Rows with others of zero bits around them.

    An f16 row has no scales, and nothing is computed of them: MLX's CUDA build crashes there.
    """
    widths = [(0, 0), (0, 0), (before, after), (0, 0)]
    return Rows(*(mx.pad(part, widths) if part.shape[-1] else part for part in rows))


def rows_to_tiles(rows: Rows, layout: KVLayout) -> mx.array:
    """Lay rows out in tiles; rows after the last are zero bits.

    Shapes:
        rows: n rows.
        returns: [B, H, ceil(n / 32), layout.tile_words] uint32.
    """
    n = rows.k.shape[2]
    n_tiles = -(-n // TILE)
    if extra := n_tiles * TILE - n:
        rows = padded(rows, 0, extra)
    k_bits = code_bits(layout.k_format, layout.itemsize)
    v_bits = layout.v_code_bits

    def tiled(part: mx.array) -> mx.array:
        return part.reshape(*part.shape[:2], n_tiles, TILE, part.shape[-1])

    k_bytes = _units_to_bytes(tiled(rows.k), k_bits)
    regions, start = [], 0
    for width, count in _column_runs(layout):
        run = k_bytes[..., start : start + width * count]
        run = run.reshape(*run.shape[:-1], count, width)
        regions.append(_flat(mx.swapaxes(run, -3, -2)))
        start += width * count
    if rows.k_scales.shape[-1]:
        regions.append(_scale_bytes(tiled(rows.k_scales)))

    units_per_vec4 = VEC4 // UNITS[v_bits][1]
    vec4s = tiled(rows.v)
    vec4s = vec4s.reshape(*vec4s.shape[:-1], -1, units_per_vec4)
    streams = mx.moveaxis(vec4s, -2, -3)  # [..., D/4, tokens, units]
    streams = _units_to_bytes(streams.reshape(*streams.shape[:-2], -1), v_bits)
    columns = streams.reshape(*streams.shape[:-1], -1, 16)
    regions.append(_flat(mx.swapaxes(columns, -3, -2)))
    if rows.v_scales.shape[-1]:
        regions.append(_scale_bytes(tiled(rows.v_scales)))
    return mx.contiguous(mx.concatenate(regions, axis=-1)).view(mx.uint32)


def tiles_to_rows(tiles: mx.array, layout: KVLayout) -> Rows:
    """The rows of tiles, token after token; the inverse of ``rows_to_tiles``.

    Shapes:
        tiles: [B, H, T, layout.tile_words] uint32.
        returns: 32 T rows.
    """
    batch, n_heads, n_tiles, _ = tiles.shape
    _, k_scales_at, v_at, v_scales_at, end = layout.offsets
    k_bits = code_bits(layout.k_format, layout.itemsize)

    runs, start = [], 0
    for width, count in _column_runs(layout):
        stop = start + TILE * width * count
        run = _words(tiles, start, stop, width).reshape(batch, n_heads, n_tiles, count, TILE, -1)
        runs.append(
            mx.swapaxes(run, -3, -2).reshape(batch, n_heads, n_tiles * TILE, -1).view(mx.uint8)
        )
        start = stop
    k_bytes = runs[0] if len(runs) == 1 else mx.concatenate(runs, axis=-1)
    v_units = _v_units(tiles, v_at, v_scales_at, layout.v_code_bits)

    def scales(first: int, last: int) -> mx.array:
        region = _words(tiles, first, last, 2).view(mx.float16)
        region = region.reshape(batch, n_heads, n_tiles, (last - first) // (2 * TILE), TILE)
        return mx.swapaxes(region, -1, -2).reshape(batch, n_heads, n_tiles * TILE, -1)

    k_groups, v_groups = _n_groups(layout)
    empty = mx.zeros((batch, n_heads, n_tiles * TILE, 0), mx.float16)
    return Rows(
        _bytes_to_units(k_bytes, k_bits),
        scales(k_scales_at, v_at) if k_groups else empty,
        v_units,
        scales(v_scales_at, end) if v_groups else empty,
    )


def _v_units(tiles: mx.array, first: int, last: int, bits: int) -> mx.array:
    """The units of V's rows, from bytes ``first`` to ``last`` of each tile.

    Shapes:
        returns: [B, H, 32 T, units in a row].
    """
    batch, n_heads, n_tiles, _ = tiles.shape
    unit_bits, per_unit = UNITS[bits]
    vec4_bytes, ragged = divmod(VEC4 * bits, 8)
    if ragged or 16 % vec4_bytes:
        columns = _words(tiles, first, last, 16).reshape(batch, n_heads, n_tiles, bits, -1, 2)
        streams = mx.swapaxes(columns, -3, -2).reshape(batch, n_heads, n_tiles, -1, 2 * bits)
        vec4s = _bytes_to_units(streams.view(mx.uint8), bits)
        vec4s = vec4s.reshape(*vec4s.shape[:-1], TILE, VEC4 // per_unit)
        rows = mx.moveaxis(vec4s, -3, -2)  # [..., tokens, D/4, units]
        return rows.reshape(batch, n_heads, n_tiles * TILE, -1)
    # whole vec4s in every column: one transposition of words brings them in order
    words = _words(tiles, first, last, vec4_bytes)
    words = words.reshape(
        batch, n_heads, n_tiles, bits, -1, 16 // vec4_bytes, max(1, vec4_bytes // 8)
    )
    rows = mx.swapaxes(words, -3, -2).reshape(batch, n_heads, n_tiles * TILE, -1)
    return rows.view(_WORD[unit_bits])


def _words(tiles: mx.array, first: int, last: int, width: int) -> mx.array:
    """Bytes ``first`` to ``last`` of each tile, in the largest words that runs of ``width`` allow.

    A copy that changes the order costs by the word, not by the byte.
    """
    size = min(width, 8)
    return tiles.view(_BY_SIZE[size])[..., first // size : last // size]


@lru_cache(maxsize=1024)
def first_rows_mask(layout: KVLayout, n_rows: int) -> mx.array:
    """The bits of a tile that belong to its first rows.

    Shapes:
        returns: [layout.tile_words] uint32.
    """
    full = {8: 0xFF, 10: 0x3FF, 12: 0xFFF, 16: 0xFFFF, 32: 0xFFFFFFFF}

    def ones(fmt: KVFormat, bits: int, head_dim: int) -> tuple[mx.array, mx.array]:
        unit_bits, per_unit = UNITS[bits]
        units = mx.full((1, 1, n_rows, head_dim // per_unit), full[unit_bits], _WORD[unit_bits])
        scales = mx.full((1, 1, n_rows, fmt.n_groups(head_dim)), 0xFFFF, mx.uint16)
        return units, scales.view(mx.float16)

    k = ones(layout.k_format, code_bits(layout.k_format, layout.itemsize), layout.k_head_dim)
    v = ones(layout.v_format, layout.v_code_bits, layout.v_head_dim)
    mask = rows_to_tiles(Rows(*k, *v), layout).reshape(-1)
    mx.eval(mask)
    return mask


def _n_groups(layout: KVLayout) -> tuple[int, int]:
    return (
        layout.k_format.n_groups(layout.k_head_dim),
        layout.v_format.n_groups(layout.v_head_dim),
    )


def _column_runs(layout: KVLayout) -> list[tuple[int, int]]:
    """K's columns as (width, how many of it)."""
    widths = layout.k_columns
    return [(w, widths.count(w)) for w in (16, 8, 4, 2, 1) if w in widths]


def _flat(x: mx.array) -> mx.array:
    """Join the last three axes."""
    return x.reshape(*x.shape[:-3], -1)


def _scale_bytes(scales: mx.array) -> mx.array:
    """[..., tokens, groups] fp16 to the bytes of [groups][tokens]."""
    swapped = mx.contiguous(mx.swapaxes(scales, -1, -2))
    return swapped.reshape(*swapped.shape[:-2], -1).view(mx.uint8)


def _units_to_bytes(units: mx.array, bits: int) -> mx.array:
    """Cut a stream of units into bytes, lowest first, along the last axis."""
    unit_bits, _ = UNITS[bits]
    if unit_bits % 8 == 0:
        return units.view(mx.uint8) if unit_bits > 8 else units
    together = 4 if unit_bits == 10 else 2  # the fewest units that fill whole bytes
    n_bytes = unit_bits * together // 8
    shifts = mx.array(np.arange(together, dtype=np.uint64) * unit_bits)
    parts = units.astype(mx.uint64).reshape(*units.shape[:-1], -1, together)
    joined = (parts << shifts).sum(axis=-1, keepdims=True)
    return joined.view(mx.uint8)[..., :n_bytes].reshape(*units.shape[:-1], -1)


def _bytes_to_units(stream: mx.array, bits: int) -> mx.array:
    """Inverse of ``_units_to_bytes``."""
    unit_bits, _ = UNITS[bits]
    if unit_bits == 8:
        return stream
    if unit_bits % 8 == 0:
        return mx.contiguous(stream).view(_WORD[unit_bits])
    together = 4 if unit_bits == 10 else 2
    n_bytes = unit_bits * together // 8
    parts = stream.reshape(*stream.shape[:-1], -1, n_bytes).astype(mx.uint16)
    units = []
    for j in range(together):
        byte, shift = divmod(j * unit_bits, 8)
        pair = parts[..., byte] | (parts[..., byte + 1] << 8)
        units.append((pair >> shift) & ((1 << unit_bits) - 1))
    return mx.stack(units, axis=-1).reshape(*stream.shape[:-1], -1)
