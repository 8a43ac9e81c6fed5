"""Packed K and V whose first and newest tokens are stored more finely than the others."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..centring.centre import Centre
from ..quant import quantize
from ..quant.layout import TILE, KVLayout
from ..quant.rotate import rotate
from ..quant.tiles import tiles_to_rows
from .packed import PackedKV, empty_tiles

Heads = tuple[int, int]  # the first KV head, and how many


class SegmentedKV(NamedTuple):
    """Three segments of packed rows, and rows that are not packed yet.

    Row p of sequence b, which begins at row ``starts[b]``, is read from

    - ``sink``, row p - starts[b], if it is one of the sequence's first ``n_sink`` and p < n_sunk;
    - else ``body`` if p < coarse_end[b];
    - else ``tail``, row p - tail_start;
    - else ``fresh``, from the last packed row on.

    Args:
        layout: of the body.
        tail_layout, sink_layout: those of the other two; the same basis, head_dims and dtype.
        n_sink: tokens of each sequence that ``sink`` has room for; a multiple of 32.
        n_body: rows that the body has room for, a multiple of 32.
        tail_start: the tail's first row, a multiple of 32 and not above ``n_body``.
        n_tail: rows from there on.
        centre: what was subtracted from the keys.
        fresh: K and V of the newest rows, as the model made them.

    Shapes:
        sink, body, tail: [B, H, tiles, words of their layout] uint32, or ``empty_tiles()``.
        fresh: [B, H, L, k_head_dim], [B, H, L, v_head_dim].
    """

    layout: KVLayout
    tail_layout: KVLayout
    sink_layout: KVLayout
    sink: mx.array
    n_sink: int
    n_sunk: int
    body: mx.array
    n_body: int
    tail: mx.array
    tail_start: int
    n_tail: int
    coarse_end: tuple[int, ...]
    starts: tuple[int, ...]
    centre: Centre | None = None
    fresh: tuple[mx.array, mx.array] | None = None

    @property
    def newest(self) -> mx.array:
        """An array of shape [B, H, ...] that holds the newest rows."""
        if self.fresh is not None:
            return self.fresh[0]
        return self.tail if self.n_tail else self.body

    @property
    def n_packed(self) -> int:
        """Rows that are packed."""
        return self.tail_start + self.n_tail

    @property
    def n_tokens(self) -> int:
        """Rows of the sequence."""
        return self.n_packed + (0 if self.fresh is None else self.fresh[0].shape[2])

    @property
    def left_padding(self) -> mx.array | None:
        """Rows before position 0 of each sequence; None where there are none.

        Shapes:
            returns: [B] int32.
        """
        return mx.array(self.starts, mx.int32) if any(self.starts) else None

    def row_values(self, batch_size: int) -> int:
        """Values of K and V that one KV head has in ``batch_size`` sequences."""
        return batch_size * self.n_tokens * (self.layout.k_head_dim + self.layout.v_head_dim)


AnyKV = PackedKV | SegmentedKV


def packed_rows(kv: SegmentedKV, heads: Heads) -> tuple[mx.array, mx.array]:
    """The packed rows of some KV heads, turbo rows in the rotated basis, float32.

    Shapes:
        returns: [B, heads, kv.n_packed, k_head_dim] and [.., v_head_dim].
    """
    head = slice(heads[0], heads[0] + heads[1])
    n = kv.n_packed
    parts = []
    if kv.tail_start:
        parts.append(_read(kv.body[:, head], kv.layout, 0, kv.tail_start))
    if kv.n_tail:
        tail = _read(kv.tail[:, head], kv.tail_layout, 0, kv.n_tail)
        parts.append(_with_coarse_rows(kv, head, tail) if _overlap(kv) else tail)
    keys, values = _joined(parts)
    if kv.n_sink and kv.n_sunk:
        first = _read(kv.sink[:, head], kv.sink_layout, 0, kv.n_sink)
        keys, values = (_with_first_rows(kv, x, y) for x, y in zip((keys, values), first))
    if kv.centre is not None:
        dim = kv.layout.k_head_dim
        anchors = kv.centre.rows(0, n, kv.left_padding, lambda x: rotate(x, dim))
        keys = keys + anchors[:, head]
    return keys, values


def all_rows(kv: SegmentedKV, heads: Heads) -> tuple[mx.array, mx.array]:
    """All rows of some KV heads, turbo rows in the rotated basis, float32.

    Shapes:
        returns: [B, heads, kv.n_tokens, k_head_dim] and [.., v_head_dim].
    """
    parts = [packed_rows(kv, heads)] if kv.n_packed else []
    if kv.fresh is not None:
        head = slice(heads[0], heads[0] + heads[1])
        fresh = []
        for x, fmt in zip(kv.fresh, (kv.layout.k_format, kv.layout.v_format)):
            x = x[:, head].astype(mx.float32)
            fresh.append(rotate(x, x.shape[-1]) if fmt.is_turbo else x)
        parts.append((fresh[0], fresh[1]))
    return _joined(parts)


def _joined(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """K and V of consecutive rows."""
    if len(parts) == 1:
        return parts[0]
    keys, values = (mx.concatenate([part[i] for part in parts], axis=2) for i in (0, 1))
    return keys, values


def _overlap(kv: SegmentedKV) -> bool:
    """Whether a row from ``tail_start`` on is read from the body."""
    return max(kv.coarse_end) > kv.tail_start


def _read(tiles: mx.array, layout: KVLayout, first: int, n_rows: int) -> tuple[mx.array, mx.array]:
    """Rows ``first`` to ``first + n_rows`` of tiles; ``first`` is a multiple of 32."""
    last = -(-(first + n_rows) // TILE)
    rows = tiles_to_rows(tiles[:, :, first // TILE : last], layout)
    k, k_scales, v, v_scales = (part[:, :, :n_rows] for part in rows)
    dtype = getattr(mx, layout.dtype)
    return (
        quantize.values(k, k_scales, layout.k_format, layout.k_head_dim, dtype),
        quantize.values(v, v_scales, layout.v_format, layout.v_head_dim, dtype),
    )


def _with_coarse_rows(
    kv: SegmentedKV, head: slice, tail: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    """The tail's rows, or the body's where a sequence has them there."""
    n = min(kv.n_body - kv.tail_start, kv.n_tail)
    body = _read(kv.body[:, head], kv.layout, kv.tail_start, n)
    rows = mx.arange(kv.tail_start, kv.tail_start + n)
    coarse = (rows < mx.array(kv.coarse_end)[:, None])[:, None, :, None]
    keys, values = (
        mx.concatenate([mx.where(coarse, x, y[:, :, :n]), y[:, :, n:]], axis=2)
        for x, y in zip(body, tail)
    )
    return keys, values


def _with_first_rows(kv: SegmentedKV, rows: mx.array, first: mx.array) -> mx.array:
    """Rows with each sequence's first ones in the place of its own."""
    n = rows.shape[2]
    if not any(kv.starts):
        n_first = min(kv.n_sink, kv.n_sunk, n)
        return mx.concatenate([first[:, :, :n_first], rows[:, :, n_first:]], axis=2)
    index = mx.arange(n) - mx.array(kv.starts)[:, None]
    held = (index >= 0) & (index < kv.n_sink) & (mx.arange(n) < kv.n_sunk)
    index = mx.clip(index, 0, kv.n_sink - 1)[:, None, :, None]
    return mx.where(held[:, None, :, None], mx.take_along_axis(first, index, axis=2), rows)


def unsegmented(layout: KVLayout) -> SegmentedKV:
    """No packed rows, to which fresh ones may be added."""
    none = empty_tiles()
    return SegmentedKV(layout, layout, layout, none, 0, 0, none, 0, none, 0, 0, (), ())
