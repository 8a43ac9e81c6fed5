"""Rows of several sequences brought to one grid: rows move as they are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..kernels.packed import empty_tiles
from ..quant.layout import TILE, KVLayout, protected_layout
from .moving import moved


class Part(NamedTuple):
    """The sequences of a cache, or one of them, and where they go.

    shifts: by how many rows each sequence moves towards the end.
    ends: how many of its rows each sequence has.
    index: the one sequence that is meant; None: all of them.
    """

    cache: Any  # a ProtectedRows
    shifts: list[int]
    ends: list[int]
    index: int | None = None

    def of(self, values: Sequence[int]) -> list[int]:
        """What these sequences have of one value a sequence."""
        return list(values if self.index is None else values[self.index : self.index + 1])

    def tiles(self, tiles: mx.array) -> mx.array:
        """Their tiles."""
        return tiles if self.index is None else tiles[self.index : self.index + 1]


def gridded(parts: Sequence[Part], n: int, layout: KVLayout, n_heads: int) -> mx.array:
    """Tiles of rows whose newest ones are not protected: the newest ``n`` of all sequences.

    Shapes:
        returns: [B, n_heads, ceil(n / 32), layout.tile_words].
    """

    def tiles(part: Part) -> mx.array | None:
        if part.cache.layout is None:
            return None
        held = part.cache.body_and_tail
        return moved(part.tiles(held.tiles), layout, part.shifts, part.ends, n)

    return _joined(parts, -(-n // TILE), layout, n_heads, tiles)


class Protected(NamedTuple):
    """Protected rows on one grid: what kernels/segments.py says of each."""

    body: mx.array
    n_body: int
    tail: mx.array
    n_tail: int
    sink: mx.array
    n_sunk: int
    tail_start: int
    coarse_end: list[int]


def protected_grid(parts: Sequence[Part], n: int, layout: KVLayout, n_heads: int) -> Protected:
    """The newest ``n`` rows of all sequences; each row keeps the format that it has."""
    coarse_end, fine_start = [], []
    fine = protected_layout(layout)
    for part in parts:
        starts = part.of(part.cache.starts)
        held = part.of(part.cache.segments.coarse_end)
        for i, shift in enumerate(part.shifts):
            first = max(0, starts[i] + shift) if starts else n
            end = min(held[i], part.ends[i]) + shift if held else 0
            coarse_end.append(end if end > first else 0)
            fine_start.append(min(n, max(first, end)))
    start = min(fine_start) // TILE * TILE
    n_body, n_tail = max(start, -(-max(coarse_end) // TILE) * TILE), n - start

    def body(part: Part) -> mx.array | None:
        if part.cache.n_body == 0:
            return None
        ends = [min(end, part.cache.n_body) for end in part.ends]
        return moved(part.tiles(part.cache.body), layout, part.shifts, ends, n_body)

    def tail(part: Part) -> mx.array | None:
        if part.cache.n_tail == 0:
            return None
        old = part.cache.segments.tail_start
        shifts = [shift + old - start for shift in part.shifts]
        ends = [min(end - old, part.cache.n_tail) for end in part.ends]
        return moved(part.tiles(part.cache.tail), fine, shifts, ends, n_tail)

    return Protected(
        _joined(parts, n_body // TILE, layout, n_heads, body),
        n_body,
        _joined(parts, -(-n_tail // TILE), fine, n_heads, tail),
        n_tail,
        joined_sinks(parts, fine, n_heads),
        n,
        start,
        [max(end, start) for end in coarse_end],
    )


def joined_sinks(parts: Sequence[Part], fine: KVLayout, n_heads: int) -> mx.array:
    """The first tokens of all sequences, in the layout of protected rows."""
    sinks = [part.tiles(part.cache.with_first_tokens().sink) for part in parts]
    n_sink = max(sink.shape[2] for sink in sinks)
    return _joined(parts, n_sink, fine, n_heads, lambda part: _if_any(sinks[parts.index(part)]))


def _if_any(tiles: mx.array) -> mx.array | None:
    return tiles if tiles.shape[2] else None


def _joined(
    parts: Sequence[Part],
    n_tiles: int,
    layout: KVLayout,
    n_heads: int,
    make: Callable[[Part], mx.array | None],
) -> mx.array:
    """Tiles of all parts; zeros of those that hold none."""
    if n_tiles == 0:
        return empty_tiles()
    made = []
    for part in parts:
        tiles = make(part)
        shape = len(part.shifts), n_heads, n_tiles, layout.tile_words
        made.append(mx.zeros(shape, mx.uint32) if tiles is None else tiles)
    return mx.concatenate(made) if len(made) > 1 else mx.contiguous(made[0])
