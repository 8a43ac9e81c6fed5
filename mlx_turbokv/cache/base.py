"""What the packed caches share: rows that are quantised when written, in a body and a tail.

Whole tiles of 32 tokens collect in a body; the newest tokens are in a tail of at most FLUSH_TOKENS.
Only the tail is made anew at each token.
"""

from __future__ import annotations

from typing import TypeVar

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from ..attention import hook
from ..attention.arrays import Handle, KVArray, Source, lazy_keys_and_values
from ..centring.centre import Centre
from ..errors import InputError
from ..kernels.backend import Backend, select_backend
from ..kernels.packed import PackedKV, empty_tiles
from ..quant.formats import KVFormat, as_format
from ..quant.layout import TILE, KVLayout, shared_layout

FLUSH_TOKENS = 256
STATE_VERSION = 2
STATE_LENGTH = 11  # values of the state that all packed caches have
hook.install()
Cache = TypeVar("Cache", bound=type)


def loadable(cls: Cache) -> Cache:
    """Make a class known to mlx-lm's ``load_prompt_cache``, which looks names up in its module."""
    setattr(mlx_lm_cache, cls.__name__, cls)
    return cls


class PackedCache(mlx_lm_cache._BaseCache):
    """Packed rows of K and V of one layer, and how they grow and shrink.

    Args:
        k_format, v_format: formats or their names.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: what to subtract from the keys before they are quantised; turbo keys only.

    Raises:
        InputError: an unknown format or back-end, or a centre for keys that are not turbo.
    """

    flush_tokens = FLUSH_TOKENS  # tokens in the tail that go into the body
    centre: Centre | None = None
    handles = False  # whether an update of one token returns Handles

    def __init__(
        self,
        k_format: KVFormat | str,
        v_format: KVFormat | str,
        backend: str | None = None,
        centre: Centre | None = None,
    ) -> None:
        self.k_format = as_format(k_format)
        self.v_format = as_format(v_format)
        if centre is not None and not self.k_format.is_turbo:
            raise InputError(f"Keys in {self.k_format} cannot be centred: turbo formats can.")
        self.centre = centre
        self._backend_name = select_backend(backend).name
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

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVArray, KVArray]:
        """Pack new tokens and return all of K and V.

        Shapes:
            keys, values: [B, H, L, k_head_dim or v_head_dim].
            returns: [B, H, n, k_head_dim], [B, H, n, v_head_dim], n the rows held now: lazy
                arrays, or after one token ``Handle``s if ``handles`` is set.

        Raises:
            InputError: a head_dim cannot be stored in the format.
            ValueError: keys or values differ from the cache's in shape.
        """
        self._check(keys, values)
        if self.layout is None:
            self.layout = self._layout_of(keys, values)
        self._append(keys, values)
        if self.handles and keys.shape[2] == 1:
            source, dtype = self._source(), keys.dtype
            return Handle(source, dtype, True), Handle(source, dtype, False)
        return lazy_keys_and_values(self._source(), keys.dtype)

    def _source(self) -> Source:
        """What attention is given."""
        return Source(self.packed, self.backend)

    def _layout_of(self, keys: mx.array, values: mx.array) -> KVLayout:
        dtype = str(keys.dtype).removeprefix("mlx.core.")
        k_head_dim, v_head_dim = keys.shape[-1], values.shape[-1]
        return shared_layout(self.k_format, self.v_format, k_head_dim, v_head_dim, dtype)

    def _check(self, keys: mx.array, values: mx.array) -> None:
        if self.layout is None:
            return
        batch, n_heads = self.keys.shape[:2]
        expected = batch, n_heads, self.layout.k_head_dim, self.layout.v_head_dim
        batch, n_heads, _, k_head_dim = keys.shape
        given = batch, n_heads, k_head_dim, values.shape[-1]
        if given != expected:
            raise ValueError(
                f"[{type(self).__name__}] keys {keys.shape} and values {values.shape} do not "
                f"continue a cache of (B, H, k_head_dim, v_head_dim) = {expected}."
            )

    def _append(self, keys: mx.array, values: mx.array) -> None:
        """Pack the new tokens into the tail, or into the body where they fill enough tiles."""
        n_new = keys.shape[2]
        total = self.n_tail + n_new
        if total < self.flush_tokens:
            self.tail = self._pack(keys, values)
            self.n_tail = total
            return
        n_left = total % TILE
        n_flushed = n_new - n_left if n_new >= n_left else 0
        if n_flushed:
            flushed = self._pack(keys[:, :, :n_flushed], values[:, :, :n_flushed])
            self.tail, self.n_tail = empty_tiles(), 0
            self._extend_body(flushed)
        if n_flushed < n_new:
            self.tail = self._pack(keys[:, :, n_flushed:], values[:, :, n_flushed:])
            self.n_tail += n_new - n_flushed

    def _pack(self, keys: mx.array, values: mx.array) -> mx.array:
        """The tail with these tokens after it."""
        options = {}
        if self.centre is not None:
            left_padding = self._position_padding()
            options = {"centre": self.centre, "first": self.size(), "left_padding": left_padding}
        return self.backend.pack(keys, values, self.layout, self.tail, self.n_tail, **options)

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

    def keys_and_values(self, dtype: mx.Dtype | None = None) -> tuple[mx.array, mx.array]:
        """All of K and V, lazily dequantised, in ``dtype`` or the model's own.

        Shapes:
            returns: [B, H, n, k_head_dim], [B, H, n, v_head_dim].
        """
        source = self._source()
        own: mx.Dtype = getattr(mx, source.packed.layout.dtype)
        return lazy_keys_and_values(source, dtype or own)

    @property
    def keys(self) -> mx.array:
        """The array that holds the newest rows.

        Pipeline-parallel models replace it by itself with a dependency on a message.
        """
        return self.tail if self.n_tail else self.body

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

    def size(self) -> int:
        """Tokens in the cache, padding included."""
        return self.n_rows

    def empty(self) -> bool:
        """Whether nothing has been written."""
        return self.layout is None

    @property
    def nbytes(self) -> int:
        """Bytes resident, stale rows and the tail's free rows included."""
        rows = self.body.nbytes + self.tail.nbytes
        if self.centre is None or not rows:
            return rows
        return rows + self.centre.nbytes(self.size())

    def is_trimmable(self) -> bool:
        """Tokens can be taken off the end."""
        return True

    def trim(self, n: int) -> int:
        """Take up to ``n`` tokens off the end; returns how many."""
        n = min(self.n_rows, n)
        if n <= self.n_tail:
            self.n_tail -= n
        else:
            kept = self.n_rows - n
            self.n_body, self.n_tail = kept - kept % TILE, kept % TILE
            first = self.n_body // TILE
            self.tail = self.body[:, :, first : first + 1]
        if self.n_tail == 0:
            self.tail = empty_tiles()
        if self.n_rows == 0:
            self._clear()
        return n

    @property
    def state(self) -> list:
        """What saving, loading and evaluation need: arrays and scalars."""
        centre = None if self.centre is None else self.centre.state
        header = [STATE_VERSION, str(self.k_format), str(self.v_format), centre]
        rows = [None, None, 0, 0, 0, 0, ""]
        if self.layout is not None:
            body, tail = self.body if self.n_body else None, self.tail if self.n_tail else None
            dims = self.layout.k_head_dim, self.layout.v_head_dim
            rows = [body, tail, self.n_body, self.n_tail, *dims, self.layout.dtype]
        return [*header, *rows, *self._extra_state()]

    @state.setter
    def state(self, state: list) -> None:
        version = state[0] if isinstance(state, (list, tuple)) and state else None
        if type(version) is int and version != STATE_VERSION:
            raise InputError(
                f"A packed cache of format version {version} cannot be read: this package reads "
                f"version {STATE_VERSION}."
            )
        try:
            _, k_format, v_format, centre, body, tail, *counts, dtype = state[:STATE_LENGTH]
            n_body, n_tail, k_dim, v_dim = counts
            self.centre = None if centre is None else Centre.from_state(centre)
            self._clear()
            self._set_extra_state(list(state[STATE_LENGTH:]))
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"This is not the state of a {type(self).__name__}: {error}."
            ) from None
        self.k_format, self.v_format = KVFormat.parse(k_format), KVFormat.parse(v_format)
        if not hasattr(self, "_backend_name"):
            self._backend_name = select_backend().name
        if dtype:
            dims = int(k_dim), int(v_dim)
            self.layout = shared_layout(self.k_format, self.v_format, *dims, dtype)
            self.body = empty_tiles() if body is None else body
            self.tail = empty_tiles() if tail is None else tail
            self.n_body, self.n_tail = int(n_body), int(n_tail)

    def _extra_state(self) -> list:
        """What a kind of cache adds to the state."""
        return []

    def _set_extra_state(self, extra: list) -> None:
        """Take what ``_extra_state`` gave.

        Raises:
            TypeError, ValueError, AttributeError: it is something else.
        """
        if extra:
            raise ValueError(f"it has {len(extra)} values too many")
