"""Packed rows of K and V, and how they grow and shrink.

Whole tiles of 32 tokens collect in a body; the newest tokens are in a tail of fewer than
FLUSH_TOKENS. A token rewrites the tail and never the body.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..centring.centre import Centre
from ..checked import of
from ..errors import InputError
from ..kernels.backend import Backend, select_backend
from ..kernels.packed import PackedKV, empty_tiles
from ..quant.formats import FORMAT, KVFormat, as_format
from ..quant.layout import TILE, KVLayout, shared_layout

CENTRE = of("a Centre or None", Centre).or_none()
FLUSH_TOKENS = 256
# more stale tiles than this are freed at once; fewer stay until the body is next written
MOST_STALE_TILES = FLUSH_TOKENS // TILE


class PackedRows:
    """Packed rows of K and V of one layer.

    Args:
        k_format, v_format: formats or their names.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: what to subtract from the keys before they are quantised; turbo keys only.

    Raises:
        InputError: an unknown format or back-end, a centre for keys that are not turbo, or one with
            scales for a back-end whose kernels do not read them.
    """

    flush_tokens = FLUSH_TOKENS  # tokens in the tail that go into the body
    centre: Centre | None = None

    def __init__(
        self,
        k_format: KVFormat | str,
        v_format: KVFormat | str,
        backend: str | None = None,
        centre: Centre | None = None,
    ) -> None:
        FORMAT("k_format", k_format)
        FORMAT("v_format", v_format)
        CENTRE("centre", centre)
        self.k_format = as_format(k_format)
        self.v_format = as_format(v_format)
        if centre is not None and not self.k_format.is_turbo:
            raise InputError(f"Keys in {self.k_format} cannot be centred: turbo formats can.")
        self.centre = centre
        self._backend_name = select_backend(backend).request
        self._clear()

    def _clear(self) -> None:
        self.layout: KVLayout | None = None
        self.body: mx.array = empty_tiles()
        self.tail: mx.array = empty_tiles()
        self.n_body = 0
        self.n_tail = 0

    @property
    def backend(self) -> Backend:
        """The back-end that packs and reads this cache."""
        return select_backend(self._backend_name)

    @property
    def packed(self) -> PackedKV:
        """The packed rows as attention reads them.

        Raises:
            ValueError: the cache is empty.
        """
        return self.body_and_tail

    @property
    def body_and_tail(self) -> PackedKV:
        """Body and tail, where they are of one layout.

        Raises:
            ValueError: the cache is empty.
        """
        if self.layout is None:
            raise ValueError(f"[{type(self).__name__}] the cache is empty.")
        padding = None if self.centre is None else self._position_padding()
        return PackedKV(
            self.layout, self.body, self.n_body, self.tail, self.n_tail, self.centre, padding
        )

    def _position_padding(self) -> mx.array | None:
        """Rows before position 0 of each sequence; None where there are none.

        Shapes:
            returns: [B] int32.
        """
        return None

    @property
    def newest(self) -> mx.array:
        """The array that holds the newest rows."""
        return self.tail if self.n_tail else self.body

    @property
    def keys(self) -> mx.array:
        """The same, by the name that pipeline-parallel models know.

        They replace it by itself with a dependency on a message.
        """
        return self.newest

    @keys.setter
    def keys(self, array: mx.array) -> None:
        if self.n_tail:
            self.tail = array
        else:
            self.body = array

    @property
    def n_rows(self) -> int:
        """Rows held, padding included."""
        return self.n_body + self.n_tail

    @property
    def nbytes(self) -> int:
        """Bytes resident, stale rows and the tail's free rows included."""
        rows = self.body.nbytes + self.tail.nbytes
        if self.centre is None or not rows:
            return rows
        return rows + self.centre.nbytes(self.n_rows)

    def _layout_of(self, keys: mx.array, values: mx.array) -> KVLayout:
        dtype = str(_common_dtype(keys, values)).removeprefix("mlx.core.")
        k_head_dim, v_head_dim = keys.shape[-1], values.shape[-1]
        return shared_layout(self.k_format, self.v_format, k_head_dim, v_head_dim, dtype)

    def _cast(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """New rows in one type: the cache's own where rows are stored as they are (f16)."""
        dtype = keys.dtype
        if self.layout is not None and self.layout.is_raw:
            dtype = getattr(mx, self.layout.dtype)
        elif values.dtype != dtype:
            dtype = _common_dtype(keys, values)
        if keys.dtype == dtype == values.dtype:  # a step's usual case: nothing is built
            return keys, values
        return keys.astype(dtype), values.astype(dtype)

    def _append(self, keys: mx.array, values: mx.array) -> None:
        """Pack the new tokens into the tail, or into the body where they fill enough tiles."""
        n_new, first = keys.shape[2], self.n_rows
        total = self.n_tail + n_new
        if total < self.flush_tokens:
            self.tail = self._pack(keys, values, first, (0, n_new))
            self.n_tail = total
            return
        n_left = total % TILE
        n_flushed = n_new - n_left if n_new >= n_left else 0
        if n_flushed:
            flushed = self._pack(keys, values, first, (0, n_flushed))
            self.tail, self.n_tail = empty_tiles(), 0
            self._extend_body(flushed)
        if n_flushed < n_new:
            self.tail = self._pack(keys, values, first, (n_flushed, n_new))
            self.n_tail += n_new - n_flushed

    def _pack(
        self, keys: mx.array, values: mx.array, first: int, part: tuple[int, int]
    ) -> mx.array:
        """The tail with a part of these rows, of which the first is row ``first``, after it."""
        assert self.layout is not None
        kept = self.tail, self.n_tail
        return self._pack_rows(keys, values, self.layout, *kept, first, part=part)

    def _pack_rows(
        self,
        keys: mx.array,
        values: mx.array,
        layout: KVLayout,
        tiles: mx.array,
        n_kept: int,
        first: int,
        aligned: bool = False,
        part: tuple[int, int] | None = None,
    ) -> mx.array:
        """Tiles with a part of these rows, of which the first is row ``first``, after ``n_kept``.

        ``aligned``: rows are counted from each sequence's first token.
        """
        options: dict[str, Any] = {"part": part}
        if self.centre is not None:
            left_padding = None if aligned else self._position_padding()
            options |= {"centre": self.centre, "first": first, "left_padding": left_padding}
        return self.backend.pack(keys, values, layout, tiles, n_kept, **options)

    def _extend_body(self, tiles: mx.array) -> None:
        """Add full tiles to the body."""
        if self.n_body:
            body = self.body
            if body.shape[2] * TILE > self.n_body:
                body = body[:, :, : self.n_body // TILE]
            tiles = mx.concatenate([body, tiles], axis=2)
        self.body = tiles
        self.n_body = tiles.shape[2] * TILE

    def _set_tiles(self, tiles: mx.array, n: int, layout: KVLayout) -> None:
        """Hold these tiles and nothing else; ``n`` rows of them are valid."""
        n_full = n // TILE
        self.layout = layout
        self.n_body, self.n_tail = n_full * TILE, n % TILE
        self.body = mx.contiguous(tiles[:, :, :n_full]) if n_full else empty_tiles()
        self.tail = mx.contiguous(tiles[:, :, n_full:]) if self.n_tail else empty_tiles()

    def trim(self, n: int) -> int:
        """Take up to ``n`` tokens off the end; returns how many."""
        n = min(self.n_rows, n)
        if n <= self.n_tail:
            self.n_tail -= n
        else:
            kept = self.n_rows - n
            self.n_body, self.n_tail = kept - kept % TILE, kept % TILE
            first = self.n_body // TILE
            self.tail = mx.contiguous(self.body[:, :, first : first + 1])
            self._free_stale_tiles()
        if self.n_tail == 0:
            self.tail = empty_tiles()
        if self.n_rows == 0:
            self._clear()
        return n

    def _free_stale_tiles(self) -> None:
        """Copy the body if a large part of it is stale."""
        n_tiles = self.n_body // TILE
        if self.body.shape[2] - n_tiles <= MOST_STALE_TILES:
            return
        self.body = mx.contiguous(self.body[:, :, :n_tiles]) if n_tiles else empty_tiles()
        mx.async_eval(self.body, self.tail)


def _common_dtype(keys: mx.array, values: mx.array) -> mx.Dtype:
    """The type that holds both; that of most models' K and V."""
    return keys.dtype if keys.dtype == values.dtype else mx.result_type(keys, values)
