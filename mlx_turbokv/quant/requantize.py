"""Rows of one layout in the formats of another, without leaving the rotated basis.

Centred keys stay centred: what was subtracted from them depends on the position alone.
"""

from __future__ import annotations

import mlx.core as mx

from . import quantize
from .formats import KVFormat
from .layout import KVLayout
from .tiles import Rows, rows_to_tiles, tiles_to_rows


def requantize(tiles: mx.array, layout: KVLayout, new: KVLayout) -> mx.array:
    """Tiles of ``layout`` as tiles of ``new``. Rows whose format stays keep their bits.

    Shapes:
        tiles: [B, H, T, layout.tile_words]; returns: [B, H, T, new.tile_words].

    Raises:
        ValueError: the formats differ in more than the bits of turbo codes.
    """
    if new == layout:
        return tiles
    rows = tiles_to_rows(tiles, layout)
    k = _requantized(rows.k, rows.k_scales, layout.k_format, new.k_format, layout.k_head_dim)
    v = _requantized(rows.v, rows.v_scales, layout.v_format, new.v_format, layout.v_head_dim)
    return rows_to_tiles(Rows(*k, *v), new)


def _requantized(
    units: mx.array, scales: mx.array, fmt: KVFormat, new: KVFormat, head_dim: int
) -> tuple[mx.array, mx.array]:
    if new == fmt:
        return units, scales
    if not (fmt.is_turbo and new.is_turbo):
        raise ValueError(f"[requantize] rows in {fmt} do not become rows in {new}.")
    y = quantize.values(units, scales, fmt, head_dim, mx.float32)
    return quantize.quantize_rotated(y, new)
