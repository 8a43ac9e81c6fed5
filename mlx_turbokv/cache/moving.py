"""Moves packed rows within their tiles: nothing is quantised twice."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..quant.layout import TILE, KVLayout
from ..quant.tiles import Rows, first_rows_mask, rows_to_tiles, tiles_to_rows


def moved(
    tiles: mx.array, layout: KVLayout, shifts: list[int], ends: list[int], n: int
) -> mx.array:
    """Tiles whose row p is row p - shift of the given ones; zeros where that is no row.

    Args:
        shifts: by how many rows each sequence moves towards the end.
        ends: how many of its rows each sequence has.
        n: rows of the result.

    Shapes:
        tiles: [B, H, T, layout.tile_words]; returns: [B, H, ceil(n / 32), layout.tile_words].
    """
    n_tiles = -(-n // TILE)
    if not any(shifts) and all(end >= n for end in ends):
        return tiles[:, :, :n_tiles]
    if all(shift % TILE == 0 and end >= n - shift for shift, end in zip(shifts, ends)):
        return _moved_tiles(tiles, [shift // TILE for shift in shifts], n_tiles)
    rows = mx.arange(n_tiles * TILE)[None] - mx.array(shifts)[:, None]
    last = mx.minimum(mx.array(ends), n - mx.array(shifts))
    valid = mx.logical_and(rows >= 0, rows < last[:, None])[:, None, :, None]
    rows = mx.clip(rows, 0, tiles.shape[2] * TILE - 1)[:, None, :, None]

    def move(part: mx.array) -> mx.array:
        if part.shape[-1] == 0:
            return mx.zeros((*part.shape[:2], n_tiles * TILE, 0), part.dtype)
        taken = mx.take_along_axis(part, rows, axis=2)
        return mx.where(valid, taken, mx.zeros((), part.dtype))

    return rows_to_tiles(Rows(*map(move, tiles_to_rows(tiles, layout))), layout)


def _moved_tiles(tiles: mx.array, shifts: list[int], n_tiles: int) -> mx.array:
    """``moved`` by whole tiles: nothing needs to be unpacked."""
    index = mx.arange(n_tiles)[None] - mx.array(shifts)[:, None]
    taken = mx.take_along_axis(
        tiles, mx.clip(index, 0, tiles.shape[2] - 1)[:, None, :, None], axis=2
    )
    return mx.where((index >= 0)[:, None, :, None], taken, mx.array(0, mx.uint32))


def joined(parts: list[tuple[mx.array, list[int]]], layout: KVLayout) -> mx.array:
    """Rows of several arrays of tiles: of each those before its ends, from the ends before it on.

    Args:
        parts: tiles, and how many rows of each sequence end where the next part's begin; the ends
            do not decrease from part to part.

    Shapes:
        each part's tiles, and what is returned: [B, H, T, layout.tile_words].
    """
    result = None
    before: list[int] = []
    for tiles, ends in parts:
        mask = _rows_mask(layout, ends, tiles.shape[2])
        if result is None:
            result = tiles & mask
        elif ends != before:
            result = result | (tiles & (mask ^ _rows_mask(layout, before, tiles.shape[2])))
        before = ends
    if result is None:
        raise ValueError("[joined] there are no parts.")
    return result


def _rows_mask(layout: KVLayout, ends: list[int], n_tiles: int) -> mx.array:
    """The bits of each sequence's rows before its end.

    Shapes:
        returns: [B, 1, n_tiles, layout.tile_words] uint32.
    """
    counts = [[min(max(end - TILE * i, 0), TILE) for i in range(n_tiles)] for end in ends]
    return _first_rows_masks(layout)[mx.array(counts)][:, None]


@lru_cache(maxsize=64)
def _first_rows_masks(layout: KVLayout) -> mx.array:
    """The bits of a tile's first 0, 1, ..., 32 rows: [33, layout.tile_words]."""
    masks = [mx.zeros((layout.tile_words,), mx.uint32)]
    masks += [first_rows_mask(layout, n) for n in range(1, TILE + 1)]
    array = mx.stack(masks)
    mx.eval(array)  # the server generates in a thread of its own
    return array
