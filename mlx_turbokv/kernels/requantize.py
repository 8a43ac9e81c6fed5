"""Rows of one layout in the formats of another, without leaving the rotated basis.

Centred keys stay centred: what was subtracted from them depends on the position alone.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..quant.layout import TILE, KVLayout, shared_layout
from .packed import PackedKV, empty_tiles
from .segments import Reader


def requantize(
    tiles: mx.array, layout: KVLayout, new: KVLayout, read: Reader, pack: Callable
) -> mx.array:
    """Tiles of ``layout`` as tiles of ``new``. Rows whose format stays keep their bits.

    Args:
        read, pack: a back-end's ``rotated_rows`` and ``pack``.

    Shapes:
        tiles: [B, H, T, layout.tile_words]; returns: [B, H, T, new.tile_words].

    Raises:
        ValueError: the formats differ in more than the bits of turbo codes.
    """
    if new == layout:
        return tiles
    sides = (layout.k_format, new.k_format), (layout.v_format, new.v_format)
    for fmt, other in sides:
        if fmt != other and not (fmt.is_turbo and other.is_turbo):
            raise ValueError(f"[requantize] rows in {fmt} do not become rows in {other}.")
    rows = PackedKV(layout, empty_tiles(), 0, tiles, TILE * tiles.shape[2])
    keys, values = read(rows, mx.float32, 0, tiles.shape[1])
    own = shared_layout(new.k_format, new.v_format, new.k_head_dim, new.v_head_dim, "float32")
    packed = pack(keys, values, own, rotated=True)
    k, v = packed[..., : own.k_words], packed[..., own.k_words :]
    if layout.k_format == new.k_format:
        k = tiles[..., : layout.k_words]
    elif layout.v_format != new.v_format:
        return packed
    else:
        v = tiles[..., layout.k_words :]
    return mx.concatenate([k, v], axis=-1)
