"""What the packed caches share: mlx-lm's cache protocol over packed rows."""

from __future__ import annotations

from typing import TypeVar

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from ..attention import hook
from ..attention.arrays import Handle, KVArray, Source, lazy_keys_and_values
from ..errors import InputError
from ..kernels.backend import select_backend
from ..kernels.decode import MAX_QUERIES
from ..kernels.segments import SegmentedKV, unsegmented
from ..quant.layout import TILE
from . import state as checks
from .prefix import PrefixCached
from .protected import ProtectedRows, Segments

UNPROTECTED_VERSION, STATE_VERSION = 2, 3  # the first is written where no tokens are protected
STATE_LENGTH = 11  # values of the state that all packed caches have
PROTECTED_LENGTH = STATE_LENGTH + 6
hook.install()
Cache = TypeVar("Cache", bound=type)


def loadable(cls: Cache) -> Cache:
    """Make a class known to mlx-lm's ``load_prompt_cache``, which looks names up in its module."""
    setattr(mlx_lm_cache, cls.__name__, cls)
    return cls


class PackedCache(ProtectedRows, PrefixCached, mlx_lm_cache._BaseCache):
    """Packed K and V of one layer, with what mlx-lm asks of every cache.

    Args:
        k_format, v_format: formats or their names.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: what to subtract from the keys before they are quantised; turbo keys only.

    Raises:
        InputError: an unknown format or back-end, or a centre for keys that are not turbo.
    """

    # where set, an update of one token returns Handles, as long as these functions are unchanged
    handles: hook.AttentionFunctions | None = None

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
        if keys.shape[2] == 0 and self.layout is None:
            return keys, values
        if self.layout is None:
            self.layout = self._layout_of(keys, values)
        dtypes, source = (keys.dtype, values.dtype), None
        keys, values = self._cast(keys, values)
        if self.protection.recent > 0 and keys.shape[2] > MAX_QUERIES:
            # a model's values are a view, which attention and packing would each copy
            keys, values = mx.contiguous(keys), mx.contiguous(values)
            source = self._source_with(keys, values)
        if keys.shape[2]:
            self._append(keys, values)
        if source is None:
            source = self._source()
        else:
            source = source._replace(held=self._held())
        if keys.shape[2] == 1 and self._may_return_handles():
            return Handle(source, dtypes[0], True), Handle(source, dtypes[1], False)
        return lazy_keys_and_values(source, *dtypes)

    def __repr__(self) -> str:
        formats = f"{self.k_format}/{self.v_format}"
        return f"{type(self).__name__}({formats}, {self.n_rows} rows, {self.nbytes:,} bytes)"

    def _may_return_handles(self) -> bool:
        """Whether nothing but attention will read what an update returns."""
        if self.handles is None or "update_and_fetch" in vars(self):
            return False
        inherited = type(self).update_and_fetch is PackedCache.update_and_fetch
        return inherited and self.handles.unchanged()

    def _source(self) -> Source:
        """What attention is given."""
        return Source(self.packed, self.backend)

    def _held(self) -> tuple[mx.array, ...]:
        """The arrays of packed rows, those of the newest rows last: there is a tail."""
        held = self.body, self.segments.sink, self.tail
        return tuple(x for x in held if x.size)

    def _source_with(self, keys: mx.array, values: mx.array) -> Source:
        """What attention is given of many new tokens: older rows as they are stored before.

        The new ones are as the model made them.
        """
        rows = self.packed if self.n_rows or self.layout is None else unsegmented(self.layout)
        if not isinstance(rows, SegmentedKV):
            raise TypeError("only protected rows are read beside new ones")
        return Source(rows._replace(fresh=(keys, values)), self.backend)

    def _check(self, keys: mx.array, values: mx.array) -> None:
        if self.layout is None:
            return
        batch, n_heads = self.newest.shape[:2]
        expected = batch, n_heads, self.layout.k_head_dim, self.layout.v_head_dim
        batch, n_heads, _, k_head_dim = keys.shape
        given = batch, n_heads, k_head_dim, values.shape[-1]
        if given != expected:
            raise ValueError(
                f"[{type(self).__name__}] keys {keys.shape} and values {values.shape} do not "
                f"continue a cache of (B, H, k_head_dim, v_head_dim) = {expected}."
            )

    def keys_and_values(self, dtype: mx.Dtype | None = None) -> tuple[mx.array, mx.array]:
        """All of K and V, lazily dequantised, in ``dtype`` or the model's own.

        Shapes:
            returns: [B, H, n, k_head_dim], [B, H, n, v_head_dim].
        """
        source = self._source()
        own: mx.Dtype = getattr(mx, source.packed.layout.dtype)
        return lazy_keys_and_values(source, dtype or own, dtype or own)

    def size(self) -> int:
        """Tokens in the cache, padding included."""
        return self.n_rows

    def empty(self) -> bool:
        """Whether nothing has been written."""
        return self.layout is None

    def is_trimmable(self) -> bool:
        """Tokens can be taken off the end."""
        return True

    @property
    def state(self) -> list:
        """What saving, loading and evaluation need: arrays and scalars."""
        centre = None if self.centre is None else self.centre.state
        version = STATE_VERSION if self.protection else UNPROTECTED_VERSION
        header = [version, str(self.k_format), str(self.v_format), centre]
        rows = [None, None, 0, 0, 0, 0, ""]
        if self.layout is not None:
            # valid tiles alone; kernels, which would copy a slice, never see these
            n_tiles = self.n_body // TILE
            body = self.body[:, :, :n_tiles] if n_tiles < self.body.shape[2] else self.body
            body, tail = body if n_tiles else None, self.tail if self.n_tail else None
            dims = self.layout.k_head_dim, self.layout.v_head_dim
            rows = [body, tail, self.n_body, self.n_tail, *dims, self.layout.dtype]
        if self.protection:
            rows += self._protected_state()
        return [*header, *rows, *self._extra_state()]

    def _protected_state(self) -> list:
        sink, n_sunk, tail_start, coarse_end = self.segments
        ends = mx.array(coarse_end, mx.int32) if coarse_end else None
        sink = sink if sink.size else None
        return [self.protection.sink, self.protection.recent, sink, n_sunk, tail_start, ends]

    @state.setter
    def state(self, state: list) -> None:
        version = state[0] if isinstance(state, (list, tuple)) and state else None
        before = dict(vars(self))
        if type(version) is int and version not in (UNPROTECTED_VERSION, STATE_VERSION):
            raise InputError(
                f"A packed cache of format version {version} cannot be read: this package reads "
                f"versions {UNPROTECTED_VERSION} and {STATE_VERSION}."
            )
        try:
            if type(version) is not int or len(state) < STATE_LENGTH:
                raise ValueError("it has no version, or too few values")
            self._take(list(state))
        except (TypeError, ValueError) as error:
            vars(self).clear()
            vars(self).update(before)
            text = str(error).rstrip(".")
            raise InputError(f"This is not the state of a {type(self).__name__}: {text}.") from None

    def _take(self, state: list) -> None:
        """Hold what a state says.

        Raises:
            TypeError, ValueError: its values contradict each other.
        """
        self.k_format, self.v_format = checks.formats(*state[1:3])
        more, length = [], STATE_LENGTH
        if state[0] != UNPROTECTED_VERSION:
            more, length = state[STATE_LENGTH:PROTECTED_LENGTH], PROTECTED_LENGTH
        self.protection = checks.protection(more)
        rows = checks.rows(
            self.k_format, self.v_format, state[4:STATE_LENGTH], self.protection.recent > 0
        )
        self.centre = checks.centre(state[3], self.k_format, rows)
        self._clear()
        if not hasattr(self, "_backend_name"):
            self._backend_name = select_backend().request
        if rows is not None:
            self.layout, self.body, self.tail, self.n_body, self.n_tail = rows
            if self.protection:
                self.segments = Segments(*checks.segments(more, rows))
        self._set_extra_state(state[length:])

    def _extra_state(self) -> list:
        """What a kind of cache adds to the state."""
        return []

    def _set_extra_state(self, extra: list) -> None:
        """Take what ``_extra_state`` gave.

        Raises:
            TypeError, ValueError: it is something else.
        """
        if extra:
            raise ValueError(f"it has {len(extra)} values too many")
