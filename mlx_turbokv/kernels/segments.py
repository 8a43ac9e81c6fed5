"""Packed K and V whose first and newest tokens are stored more finely than the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ..centring.centre import Centre
from ..centring.scales import PairScales
from ..quant.layout import TILE, KVLayout
from ..quant.rotate import rotate
from .packed import PackedKV, empty_tiles

Heads = tuple[int, int]  # the first KV head, and how many
Rows = tuple[mx.array, mx.array]  # K and V
Reader = Callable[..., Rows]  # a back-end's ``rotated_rows``


class SegmentedKV(NamedTuple):
    """Three segments of packed rows, and rows that are not packed yet.

    Row p of sequence b, which begins at row ``starts[b]``, is read from

    - ``sink``, row p - starts[b], if it is one of the sequence's first ``n_sink`` and p < n_sunk;
    - else ``body`` if p < coarse_end[b];
    - else ``tail``, row p - tail_start;
    - else ``fresh``, from the last packed row on.

    Args:
        layout: of the body.
        tail_layout, sink_layout: those of the other two; the same basis, head_dims and dtype. The
            sink's is ``protected_layout(layout)``, the tail's that or ``layout``.
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


def scales_of(packed: AnyKV) -> PairScales | None:
    """What packed keys were multiplied by before anything else; None where by nothing."""
    return None if packed.centre is None else packed.centre.scales


def all_rows(kv: SegmentedKV, heads: Heads, read: Callable[..., Rows], dtype: mx.Dtype) -> Rows:
    """All rows of some KV heads in plain ops, turbo rows in the rotated basis.

    Keys that have scales are times these, those too that are not packed. The body's rows are read
    into arrays that have room for the others, which are written there: joined, they would be in
    memory twice.

    Args:
        read: rows of one segment, from (packed, dtype, first head, heads) and the keywords
            ``room``, rows of zeros after the last, and ``row``, the first one's in the sequence.

    Shapes:
        returns: [B, heads, kv.n_tokens, k_head_dim] and [.., v_head_dim], in ``dtype``.
    """
    parts = [_tail_rows(kv, heads, read, dtype)] if kv.n_tail else []
    parts += [] if kv.fresh is None else [_fresh_rows(kv, kv.fresh, heads, dtype)]
    if kv.tail_start:
        none = empty_tiles()
        body = PackedKV(kv.layout, kv.body, kv.tail_start, none, 0, kv.centre, kv.left_padding)
        rows = read(body, dtype, *heads, room=kv.n_tokens - kv.tail_start)
        start = kv.tail_start
        for part in parts:
            _write(rows, part, start)
            start += part[0].shape[2]
    else:
        rows = _joined(parts)
    if not kv.n_sink or not kv.n_sunk:
        return rows
    first = read(_tail_alone(kv.sink_layout, kv.sink, kv.n_sink, kv.centre), dtype, *heads)
    if any(kv.starts):
        keys, values = (_with_first_rows(kv, x, y) for x, y in zip(rows, first))
        return keys, values
    n = min(kv.n_sink, kv.n_sunk)
    _write(rows, (first[0][:, :, :n], first[1][:, :, :n]), 0)
    return rows


def _fresh_rows(kv: SegmentedKV, fresh: Rows, heads: Heads, dtype: mx.Dtype) -> Rows:
    """Rows that are not packed, in the basis of the others."""
    keys, values = fresh
    if (scales := scales_of(kv)) is not None:
        keys = scales.scaled(keys)
    head = slice(heads[0], heads[0] + heads[1])
    keys, values = (x[:, head].astype(dtype) for x in (keys, values))
    if kv.layout.k_format.is_turbo:
        keys = rotate(keys, keys.shape[-1], dtype=dtype)
    if kv.layout.v_format.is_turbo:
        values = rotate(values, values.shape[-1], dtype=dtype)
    return keys, values


def dequantized(kv: SegmentedKV, dtype: mx.Dtype, read: Reader) -> Rows:
    """K and V as the model would have made them; rows that are not packed yet are exact.

    Args:
        read: a back-end's ``rotated_rows``.

    Shapes:
        returns: [B, H, n, k_head_dim] and [B, H, n, v_head_dim] in ``dtype``.
    """
    fresh = [] if kv.fresh is None else [(kv.fresh[0].astype(dtype), kv.fresh[1].astype(dtype))]
    if not kv.n_packed:
        return _joined(fresh)
    layout = kv.layout
    packed = kv._replace(fresh=None)
    keys, values = read(packed, mx.float32, 0, kv.newest.shape[1])
    if layout.k_format.is_turbo:
        keys = rotate(keys, layout.k_head_dim, inverse=True)
    if (scales := scales_of(kv)) is not None:
        keys = scales.unscaled(keys)
    if layout.v_format.is_turbo:
        values = rotate(values, layout.v_head_dim, inverse=True)
    return _joined([(keys.astype(dtype), values.astype(dtype)), *fresh])


def _joined(parts: list[Rows]) -> Rows:
    """K and V of consecutive rows."""
    if len(parts) == 1:
        return parts[0]
    keys, values = (mx.concatenate([part[i] for part in parts], axis=2) for i in (0, 1))
    return keys, values


def _write(rows: Rows, part: Rows, start: int) -> None:
    """Put these rows in the place of others, from number ``start`` on."""
    for x, y in zip(rows, part):
        x[:, :, start : start + y.shape[2]] = y


def _tail_alone(
    layout: KVLayout, tiles: mx.array, n: int, centre: Centre | None,
    left_padding: mx.array | None = None,
) -> PackedKV:  # fmt: skip
    """The first ``n`` rows of tiles."""
    return PackedKV(layout, empty_tiles(), 0, tiles, n, centre, left_padding)


def _tail_rows(kv: SegmentedKV, heads: Heads, read: Callable[..., Rows], dtype: mx.Dtype) -> Rows:
    """The rows from ``tail_start`` on: the tail's, or the body's where a sequence has them."""

    def rows_of(layout: KVLayout, tiles: mx.array, n: int) -> Rows:
        own = _tail_alone(layout, tiles, n, kv.centre, kv.left_padding)
        return read(own, dtype, *heads, row=kv.tail_start)

    keys, values = rows_of(kv.tail_layout, kv.tail, kv.n_tail)
    if max(kv.coarse_end) > kv.tail_start:
        n = min(kv.n_body - kv.tail_start, kv.n_tail)
        tiles = kv.body[:, :, kv.tail_start // TILE : -(-(kv.tail_start + n) // TILE)]
        body = rows_of(kv.layout, tiles, n)
        rows = mx.arange(kv.tail_start, kv.tail_start + n)
        coarse = (rows < mx.array(kv.coarse_end)[:, None])[:, None, :, None]
        keys, values = (
            mx.concatenate([mx.where(coarse, x, y[:, :, :n]), y[:, :, n:]], axis=2)
            for x, y in zip(body, (keys, values))
        )
    return keys, values


def _with_first_rows(kv: SegmentedKV, rows: mx.array, first: mx.array) -> mx.array:
    """Rows with each sequence's first ones in the place of its own."""
    n = rows.shape[2]
    index = mx.arange(n) - mx.array(kv.starts)[:, None]
    held = (index >= 0) & (index < kv.n_sink) & (mx.arange(n) < kv.n_sunk)
    index = mx.clip(index, 0, kv.n_sink - 1)[:, None, :, None]
    return mx.where(held[:, None, :, None], mx.take_along_axis(first, index, axis=2), rows)


def unsegmented(layout: KVLayout) -> SegmentedKV:
    """No packed rows, to which fresh ones may be added."""
    none = empty_tiles()
    return SegmentedKV(layout, layout, layout, none, 0, 0, none, 0, none, 0, 0, (), ())
