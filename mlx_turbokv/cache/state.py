"""Checks of a packed cache's state, which may come from a file that nobody here wrote.

Counts, shapes, types and formats must agree with each other before a kernel reads any of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from ..centring.centre import Centre
from ..errors import short
from ..kernels.packed import empty_tiles
from ..policy.protection import UNPROTECTED, Protection
from ..quant.formats import KVFormat
from ..quant.layout import ITEMSIZE, TILE, KVLayout, protected_layout, shared_layout

MOST = (1 << 31) - 1  # kernels count rows in 32 bits


class Rows(NamedTuple):
    """Packed rows of a state.

    Shapes:
        body, tail: [B, H, T, layout.tile_words] uint32, or ``empty_tiles()``.
    """

    layout: KVLayout
    body: mx.array
    tail: mx.array
    n_body: int
    n_tail: int

    @property
    def heads(self) -> tuple[int, int]:
        """Sequences and KV heads."""
        batch, n_heads = (self.tail if self.n_tail else self.body).shape[:2]
        return batch, n_heads


def count(value: Any, name: str, least: int = 0, most: int = MOST) -> int:
    """A whole number in a range.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"{name} is {_short(value)}, not a whole number from {least:,} to {most:,}"
        )
    return value


def counts(value: Any, name: str, n: int | None, least: int = 0) -> list[int]:
    """One whole number a sequence, from an array of [n] integers; n None: any number of them.

    Raises:
        ValueError: it is something else.
    """
    if (
        not isinstance(value, mx.array)
        or value.dtype not in (mx.int32, mx.int64, mx.uint32)
        or value.ndim != 1
        or value.size != (n or max(value.size, 1))
    ):
        raise ValueError(f"{name} is {_short(value)}, not one whole number for each sequence")
    numbers: Any = value.tolist()
    return [count(number, name, least) for number in numbers]


def formats(k_format: Any, v_format: Any) -> tuple[KVFormat, KVFormat]:
    """The formats that a state names.

    Raises:
        ValueError: one of them is no format's name.
    """
    for name in (k_format, v_format):
        if not isinstance(name, str):
            raise ValueError(f"{_short(name)} is no format's name")
    return KVFormat.parse(k_format), KVFormat.parse(v_format)


def rows(
    k_format: KVFormat, v_format: KVFormat, values: list[Any], fine_tail: bool = False
) -> Rows | None:
    """The rows of a state; None of an empty one.

    Args:
        values: body, tail, n_body, n_tail, k_head_dim, v_head_dim and dtype.
        fine_tail: whether the tail's rows are protected.

    Raises:
        ValueError: they contradict each other.
    """
    body, tail, n_body, n_tail, k_dim, v_dim, dtype = values
    if dtype == "":
        if not body is tail is None or any(type(n) is not int or n for n in values[2:6]):
            raise ValueError("it holds rows of no type")
        return None
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ValueError(f"its rows are of type {_short(dtype)}, not of {', '.join(ITEMSIZE)}")
    n_body, n_tail = count(n_body, "n_body"), count(n_tail, "n_tail")
    if n_body % TILE or not 0 < n_body + n_tail <= MOST:
        raise ValueError(f"its body has {n_body:,} rows and its tail {n_tail:,}")
    dims = count(k_dim, "k_head_dim", 1), count(v_dim, "v_head_dim", 1)
    layout = shared_layout(k_format, v_format, *dims, dtype)
    body = _tiles("body", body, n_body, layout)
    tail = _tiles("tail", tail, n_tail, protected_layout(layout) if fine_tail else layout)
    if n_body and n_tail and body.shape[:2] != tail.shape[:2]:
        raise ValueError(f"its body is {body.shape} and its tail {tail.shape}")
    return Rows(layout, body, tail, n_body, n_tail)


def protection(values: list[Any]) -> Protection:
    """The protected tokens of a state's values beside its rows; none without values.

    Raises:
        ValueError: they are too few, or numbers that are not accepted.
    """
    if not values:
        return UNPROTECTED
    if len(values) < 6:
        raise ValueError("it has too few values")
    return Protection(*values[:2])


def segments(values: list[Any], held: Rows) -> tuple[mx.array, int, int, list[int]]:
    """What protected rows have beside body and tail: sink, n_sunk, tail_start and coarse_end.

    Raises:
        ValueError: they contradict each other.
    """
    n_first, _, sink, n_sunk, start, ends = values
    start = count(start, "tail_start", 0, held.n_body)
    n = start + held.n_tail
    if start % TILE or not max(1, held.n_body - TILE + 1) <= n <= MOST:
        raise ValueError(f"its body has {held.n_body:,} rows and its tail {n:,} from {start:,} on")
    batch, n_heads = held.heads
    ends = counts(ends, "coarse_end", batch, start)
    if max(ends) > min(n, held.n_body):
        raise ValueError(f"its body of {held.n_body:,} rows ends at row {max(ends):,} of {n:,}")
    n_sunk = count(n_sunk, "n_sunk", 0, n)
    fine = protected_layout(held.layout)
    if sink is None:
        return empty_tiles(), n_sunk, start, ends
    sink = _tiles("sink", sink, n_first, fine)
    if sink.shape[:3] != (batch, n_heads, n_first // TILE):
        raise ValueError(f"its sink is {sink.shape} of {n_first} tokens")
    return sink, n_sunk, start, ends


def _tiles(name: str, tiles: Any, n_rows: int, layout: KVLayout) -> mx.array:
    if n_rows == 0:
        return empty_tiles()
    if not isinstance(tiles, mx.array):
        raise ValueError(f"its {name} of {n_rows:,} rows is {_short(tiles)}")
    if (
        tiles.dtype != mx.uint32
        or tiles.ndim != 4
        or tiles.shape[3] != layout.tile_words
        or min(tiles.shape) < 1
        or tiles.shape[2] * TILE < n_rows
    ):
        raise ValueError(
            f"its {name} is {tiles.shape} {_dtype(tiles)}, where {n_rows:,} rows are (B, H, "
            f"{-(-n_rows // TILE)} or more, {layout.tile_words}) uint32"
        )
    return tiles


def centre(value: Any, k_format: KVFormat, held: Rows | None) -> Centre | None:
    """The centre of a state.

    Raises:
        ValueError, TypeError: it is none, or does not fit the keys.
    """
    if value is None:
        return None
    if not k_format.is_turbo:
        raise ValueError(f"keys in {k_format} cannot be centred")
    found = Centre.from_state(value)
    if held is not None and found.mu.shape != (held.heads[1], held.layout.k_head_dim):
        raise ValueError(
            f"its centre is {found.mu.shape}, where its keys have {held.heads[1]} heads of "
            f"{held.layout.k_head_dim}"
        )
    return found


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _short(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, mx.array):
        return f"an array {value.shape} {_dtype(value)}"
    return short(value)
