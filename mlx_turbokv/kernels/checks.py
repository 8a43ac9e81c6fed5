"""What launches are given: shapes, types and counts that agree.

A kernel reads what the counts say, wherever that lies. Counts are compared once for each new set of
them, arrays when a launch is traced: a replay with the same shapes and types needs no check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..centring.centre import KERNEL_ROWS, Centre
from ..quant.layout import TILE, KVLayout
from .packed import PackedKV


class Input(NamedTuple):
    """What an input of a kernel must be; None for those that are not read, or made by a table."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


def check_inputs(op: str, wanted: Sequence[Input | None], arrays: Sequence[mx.array]) -> None:
    """Compare arrays with what the counts and templates of a launch take for granted.

    Raises:
        ValueError: a shape or type is another.
    """
    for entry, array in zip(wanted, arrays):
        if entry is not None and (array.shape, array.dtype) != entry[1:]:
            raise ValueError(
                f"[{op}] {entry.name} {array.shape} {array.dtype} do not fit: {entry.shape} "
                f"{entry.dtype} is needed."
            )


def tiles_input(name: str, layout: KVLayout, heads: tuple[int, int], n_tiles: int) -> Input | None:
    """Tiles of (sequences, KV heads); None where there are none."""
    if n_tiles == 0:
        return None
    return Input(name, (*heads, n_tiles, layout.tile_words), mx.uint32)


def anchor_inputs(
    layout: KVLayout, heads: tuple[int, int], centred: bool, has_padding: bool
) -> tuple[Input | None, None, Input | None]:
    """The centre's rows, the table and the left padding, as tables.py gives them."""
    batch, n_heads = heads
    shape = n_heads, KERNEL_ROWS, layout.k_head_dim
    centre = Input("centre", shape, mx.float32) if centred else None
    return centre, None, padding_input(batch) if has_padding else None


def padding_input(batch: int) -> Input:
    """Left padding, as tables.py gives it."""
    return Input("left padding", (max(batch, 8),), mx.int32)


def check_counts(op: str, n_body: int, body_tiles: int, n_tail: int, tail_tiles: int) -> None:
    """Check that the rows of a body and a tail lie within their tiles.

    Raises:
        ValueError: they don't.
    """
    rows = 0 <= n_body <= TILE * body_tiles and 0 <= n_tail <= TILE * tail_tiles
    if not rows or n_body % TILE or n_body + n_tail == 0:
        raise ValueError(
            f"[{op}] {n_body} rows do not lie in a body of {body_tiles} tiles, or {n_tail} in a "
            f"tail of {tail_tiles}."
        )


def check_segments(
    op: str, batch: int, n_body: int, n_tokens: int, n_sunk: int, first_tiles: int,
    first_stride: int, tail_start: int, body_ends: Sequence[int],
) -> None:  # fmt: skip
    """Check that protected rows lie within their tiles.

    Raises:
        ValueError: they don't.
    """
    bounds = tail_start % TILE == 0 and 0 <= tail_start <= n_body and 0 <= n_sunk <= n_tokens
    last = min(n_body, n_tokens)
    ends = len(body_ends) == batch and all(0 <= end <= last for end in body_ends)
    if not (bounds and ends and 0 <= first_tiles <= first_stride):
        raise ValueError(
            f"[{op}] {n_tokens} rows with a body of {n_body} that ends at {list(body_ends)}, a "
            f"tail from {tail_start} on and {n_sunk} rows in {first_stride} first tiles do not fit."
        )


def check_packed(op: str, packed: PackedKV) -> tuple[int, int]:
    """Check packed rows whole.

    Returns:
        Sequences and KV heads.

    Raises:
        ValueError: a count, shape or type does not fit.
    """
    layout, body, n_body, tail, n_tail, centre, left_padding = packed
    newest = packed.newest
    if newest.ndim != 4:
        raise ValueError(f"[{op}] the tiles are {newest.shape}.")
    batch, n_heads = newest.shape[:2]
    n_tiles = body.shape[2] if n_body else 0, tail.shape[2] if n_tail else 0
    wanted = [
        tiles_input(name, layout, (batch, n_heads), n) for name, n in zip(("body", "tail"), n_tiles)
    ]
    check_inputs(op, wanted, (body, tail))
    check_counts(op, n_body, n_tiles[0], n_tail, n_tiles[1])
    _check_anchors(op, layout, (batch, n_heads), centre, left_padding)
    return batch, n_heads


def check_new_rows(
    op: str,
    layout: KVLayout,
    keys: mx.array,
    values: mx.array,
    tail: mx.array | None,
    n_tail: int,
    centre: Centre | None,
    left_padding: mx.array | None,
) -> None:
    """Check new rows, and the tail that they go on from.

    Raises:
        ValueError: a count, shape or type does not fit.
    """
    shape = keys.shape[:3]
    if keys.ndim != 4 or 0 in shape:
        raise ValueError(f"[{op}] keys {keys.shape} are no rows.")
    batch, n_heads, _ = shape
    stride = tail.shape[2] if tail is not None and n_tail else 0
    wanted = (
        Input("keys", (*shape, layout.k_head_dim), keys.dtype),
        Input("values", (*shape, layout.v_head_dim), values.dtype),
        tiles_input("tail", layout, (batch, n_heads), stride),
    )
    check_inputs(op, wanted, (keys, values, keys if tail is None else tail))
    check_kept(op, n_tail, stride)
    _check_anchors(op, layout, (batch, n_heads), centre, left_padding)


def check_part(op: str, part: tuple[int, int], n_new: int, n_kept: int) -> None:
    """Check which of the new rows are packed, as pack.py says.

    Raises:
        ValueError: there are no such rows, or they leave a gap to others.
    """
    start, stop = part
    whole = stop == n_new or (n_kept + stop - start) % TILE == 0
    if not 0 <= start < stop <= n_new or not whole or (start and n_kept):
        raise ValueError(
            f"[{op}] rows {start} to {stop} of {n_new}, after {n_kept} others, do not fill tiles."
        )


def check_kept(op: str, n_tail: int, tail_tiles: int) -> None:
    """Check that the kept rows of a tail lie within it.

    Raises:
        ValueError: they don't.
    """
    if not 0 <= n_tail <= TILE * tail_tiles:
        raise ValueError(f"[{op}] {n_tail} rows do not lie in a tail of {tail_tiles} tiles.")


def check_sinks(op: str, sinks: mx.array, n_heads: int) -> None:
    """Check that there is one sink a query head.

    Raises:
        ValueError: there are more or fewer.
    """
    if sinks.shape != (n_heads,):
        raise ValueError(f"[{op}] sinks {sinks.shape} do not fit {n_heads} query heads.")


def check_heads(op: str, n_heads: int, n_kv_heads: int, n_queries: int) -> None:
    """Check numbers of query heads, KV heads and queries.

    Raises:
        ValueError: query heads cannot be shared out, or there are no queries.
    """
    if n_heads < 1 or n_heads % n_kv_heads or n_queries < 1:
        raise ValueError(
            f"[{op}] {n_queries} queries of {n_heads} heads cannot read {n_kv_heads} KV heads."
        )


def check_selected(op: str, first: int, count: int, n_heads: int) -> None:
    """Check that KV heads ``first`` to ``first + count`` are there.

    Raises:
        ValueError: they are not.
    """
    if first < 0 or count < 1 or first + count > n_heads:
        raise ValueError(f"[{op}] there are no heads {first} to {first + count}: {n_heads}.")


def _check_anchors(
    op: str,
    layout: KVLayout,
    heads: tuple[int, int],
    centre: Centre | None,
    left_padding: mx.array | None,
) -> None:
    if centre is not None:
        check_inputs(op, anchor_inputs(layout, heads, True, False)[:1], [centre.kernel_rows])
    check_padding(op, left_padding, heads[0])


def check_padding(op: str, left_padding: mx.array | None, batch: int) -> None:
    """Check that there is one number of left padding for each sequence.

    Raises:
        ValueError: there is not.
    """
    if left_padding is not None:
        check_inputs(op, [Input("left padding", (batch,), mx.int32)], [left_padding])
