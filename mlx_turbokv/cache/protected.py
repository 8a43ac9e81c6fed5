"""Packed rows whose first and newest tokens are protected: three segments (kernels/segments.py).

New rows go into a fine tail. When it has LEAVE_TOGETHER rows more than are to stay, its oldest
tiles leave together: a row becomes coarse once. The first tokens of each sequence are copied
before. Rows of a long update that would leave at once are never in the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..centring.centre import Centre
from ..kernels.packed import empty_tiles
from ..kernels.segments import AnyKV, SegmentedKV
from ..policy.protection import LEAVE_TOGETHER, UNPROTECTED, Protection
from ..quant.formats import KVFormat
from ..quant.layout import TILE, KVLayout, protected_layout
from .moving import joined, moved
from .regrid import Part, gridded, joined_sinks, protected_grid
from .rows import PackedRows


class Segments(NamedTuple):
    """What the rows of protected caches are, beside body and tail; the fields of SegmentedKV."""

    sink: mx.array
    n_sunk: int
    tail_start: int
    coarse_end: list[int]


class ProtectedRows(PackedRows):
    """Packed rows of K and V of one layer, the first and the newest of them protected.

    Args:
        sink: tokens at each sequence's start that are protected.
        recent: tokens at its end that are, at least.

    Raises:
        InputError: as ``PackedRows``, or a number of tokens that is not accepted.
    """

    protection: Protection = UNPROTECTED

    def __init__(
        self,
        k_format: KVFormat | str,
        v_format: KVFormat | str,
        backend: str | None = None,
        centre: Centre | None = None,
        sink: int = 0,
        recent: int = 0,
    ) -> None:
        self.protection = Protection(sink, recent)
        super().__init__(k_format, v_format, backend, centre)

    def _clear(self) -> None:
        super()._clear()
        self.segments = Segments(empty_tiles(), 0, 0, [])

    @property
    def starts(self) -> list[int]:
        """Rows before the first token of each sequence; of an empty cache there may be none."""
        return [0] * len(self.segments.coarse_end)

    def _ends(self, n: int) -> list[int]:
        """Where sequences end whose last rows of ``n`` are padding."""
        return [n]

    def _layouts(self, layout: KVLayout) -> tuple[KVLayout, KVLayout]:
        """The tail's and the sink's."""
        fine = protected_layout(layout)
        return (fine if self.protection.recent else layout), fine

    def _n_sink(self, layout: KVLayout) -> int:
        """First tokens that are stored apart: none where all rows are fine."""
        return 0 if protected_layout(layout) == layout else self.protection.sink

    @property
    def packed(self) -> AnyKV:
        if not self.protection or self.layout is None:
            return super().packed
        sink, n_sunk, tail_start, coarse_end = self.segments
        return SegmentedKV(
            self.layout, *self._layouts(self.layout), sink,
            self._n_sink(self.layout) if sink.size else 0, n_sunk, self.body, self.n_body,
            self.tail, tail_start, self.n_tail, tuple(coarse_end),
            tuple(self.starts), self.centre,
        )  # fmt: skip

    @property
    def n_rows(self) -> int:
        if not self.protection:
            return super().n_rows
        return self.segments.tail_start + self.n_tail

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.segments.sink.nbytes

    @property
    def n_protected(self) -> int:
        """Rows of all sequences that are read in the protected formats."""
        if not self.protection or self.layout is None:
            return 0
        _, n_sunk, start, coarse_end = self.segments
        n_sink = self._n_sink(self.layout) if self.segments.sink.size else 0
        n = 0
        for first, end in zip(self.starts, coarse_end):
            newest = max(start, end) if self.protection.recent else self.n_rows
            n += self.n_rows - newest
            n += min(max(min(n_sunk, newest) - first, 0), n_sink)
        return n

    def _append(self, keys: mx.array, values: mx.array) -> None:
        if not self.protection or self.layout is None:
            super()._append(keys, values)
            return
        batch, _, n_new, _ = keys.shape
        if not self.segments.coarse_end:
            self.segments = Segments(empty_tiles(), 0, 0, [0] * batch)
        before, n_packed = self.n_rows, 0
        stop = self._leave_at(before + n_new)
        if stop > self.segments.tail_start or not self.protection.recent:
            self.segments = self.with_first_tokens(keys, values)
        if stop > self.segments.tail_start:
            n_packed = self._make_coarse(self.layout, stop, keys, values)
        if n_packed < n_new:
            layout, part = self._layouts(self.layout)[0], (n_packed, n_new)
            self.tail = self._pack_rows(
                keys, values, layout, self.tail, self.n_tail, before, part=part
            )
            self.n_tail += n_new - n_packed

    def _leave_at(self, n: int) -> int:
        """The first row that stays in the tail when there are ``n``."""
        recent, start = self.protection.recent, self.segments.tail_start
        end = min(self._ends(n))
        if end - start < recent + (LEAVE_TOGETHER if recent else self.flush_tokens):
            return start
        return max(start, (end - recent) // TILE * TILE)

    def _make_coarse(self, layout: KVLayout, stop: int, keys: mx.array, values: mx.array) -> int:
        """Move the rows before ``stop`` into the body; returns how many of the new ones."""
        start, before = self.segments.tail_start, self.n_rows
        tail_layout = self._layouts(layout)[0]
        n_old = min(stop, before) - start
        n_tiles, n_new = -(-n_old // TILE), max(0, stop - before)
        tiles = empty_tiles()
        if n_old:
            tiles = self.backend.requantize(self.tail[:, :, :n_tiles], tail_layout, layout)
        if n_new:
            part = (0, n_new)
            tiles = self._pack_rows(keys, values, layout, tiles, n_old, before, part=part)
        held = self.body[:, :, start // TILE : min(stop, self.n_body) // TILE]
        coarse_end = self.segments.coarse_end
        if held.shape[2] and max(coarse_end) > start:
            tiles = _written_over(tiles, held, layout, [end - start for end in coarse_end])
        parts = [self.body[:, :, : start // TILE], tiles]
        if self.n_body > stop:
            parts.append(self.body[:, :, stop // TILE : self.n_body // TILE])
        parts = [part for part in parts if part.shape[2]]
        self.body = mx.concatenate(parts, axis=2) if len(parts) > 1 else mx.contiguous(tiles)
        self.n_body = max(self.n_body, stop)
        stays = before - stop
        self.tail = mx.contiguous(self.tail[:, :, n_tiles:]) if stays > 0 else empty_tiles()
        self.n_tail = max(0, stays)
        coarse_end = [max(end, stop) for end in coarse_end]
        self.segments = self.segments._replace(tail_start=stop, coarse_end=coarse_end)
        return n_new

    def with_first_tokens(
        self, keys: mx.array | None = None, values: mx.array | None = None
    ) -> Segments:
        """The segments with all first tokens copied, those of new rows too."""
        layout = self.layout
        sink, n_sunk, start, coarse_end = self.segments
        n_new = 0 if keys is None else keys.shape[2]
        before, after = self.n_rows, self.n_rows + n_new
        n_sink = 0 if layout is None else self._n_sink(layout)
        starts = self.starts

        def counts(end: int) -> list[int]:
            return [min(max(end - first, 0), n_sink) for first in starts]

        found = counts(n_sunk)
        if layout is None or counts(after) == found:
            return self.segments._replace(n_sunk=max(after, n_sunk))
        tail_layout, fine = self._layouts(layout)
        parts = [(sink, found)] if any(found) else []
        if counts(before) != found:
            shifts = [start - first for first in starts]
            ends = [self.n_tail] * len(starts)
            parts.append((moved(self.tail, tail_layout, shifts, ends, n_sink), counts(before)))
        if keys is not None and values is not None and counts(after) != counts(before):
            index = mx.arange(n_sink) + mx.array(starts)[:, None] - before
            index = mx.clip(index, 0, n_new - 1)[:, None, :, None]
            k, v = (mx.take_along_axis(x, index, axis=2) for x in (keys, values))
            tiles = self._pack_rows(k, v, fine, empty_tiles(), 0, 0, aligned=True)
            parts.append((tiles, counts(after)))
        return self.segments._replace(sink=joined(parts, fine), n_sunk=after)

    def _take_sequences(self, rows: mx.array, indices: list[int]) -> None:
        """Keep these sequences, in this order."""
        self.body = self.body[rows] if self.n_body else empty_tiles()
        self.tail = self.tail[rows] if self.n_tail else empty_tiles()
        if self.protection:
            sink, n_sunk, start, ends = self.segments
            sink = sink[rows] if sink.size else sink
            self.segments = Segments(sink, n_sunk, start, [ends[i] for i in indices])

    def _hold(self, parts: Sequence[Part], n: int, layout: KVLayout) -> None:
        """Hold the newest ``n`` rows of these and nothing else."""
        n_heads = next(p.cache.newest.shape[1] for p in parts if p.cache.layout is not None)
        if not self.protection:
            self._set_tiles(gridded(parts, n, layout, n_heads), n, layout)
            return
        if not self.protection.recent:
            sink, start = joined_sinks(parts, protected_layout(layout), n_heads), n // TILE * TILE
            ends = [start] * sum(len(part.shifts) for part in parts)
            self._set_tiles(gridded(parts, n, layout, n_heads), n, layout)
            self.segments = Segments(sink, n, start, ends)
            return
        grid = protected_grid(parts, n, layout, n_heads)
        self.layout = layout
        self.body, self.n_body, self.tail, self.n_tail = grid[:4]
        self.segments = Segments(*grid[4:])

    def trim(self, n: int) -> int:
        if not self.protection or self.layout is None:
            return super().trim(n)
        n = min(self.n_rows, n)
        kept = self.n_rows - n
        sink, n_sunk, start, coarse_end = self.segments
        coarse_end = [min(end, kept) for end in coarse_end]
        if kept < start:  # the tail goes on in the body's last tile, whose rows stay coarse
            start = kept // TILE * TILE
            if self.protection.recent:
                words = self._layouts(self.layout)[0].tile_words
                self.tail = mx.zeros((*self.body.shape[:2], 1, words), mx.uint32)
            else:  # both are of one layout, and the tail has all its rows
                self.tail = mx.contiguous(self.body[:, :, start // TILE : start // TILE + 1])
                coarse_end = [min(end, start) for end in coarse_end]
                self.n_body = start
        self.n_tail = kept - start
        if self.n_tail == 0:
            self.tail = empty_tiles()
        self.n_body = min(self.n_body, -(-kept // TILE) * TILE)
        self.segments = Segments(sink, min(n_sunk, kept), start, coarse_end)
        self._free_stale_tiles()
        if kept == 0:
            self._clear()
        return n


def _written_over(
    tiles: mx.array, held: mx.array, layout: KVLayout, ends: Sequence[int]
) -> mx.array:
    """Tiles with each sequence's rows before its end as they are held."""
    n = held.shape[2]
    first = joined([(held, list(ends)), (tiles[:, :, :n], [n * TILE] * len(ends))], layout)
    return first if tiles.shape[2] == n else mx.concatenate([first, tiles[:, :, n:]], axis=2)
