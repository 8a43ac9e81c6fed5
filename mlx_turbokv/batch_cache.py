"""BatchTurboKVCache: packed K and V of a batch of sequences, a drop-in for mlx-lm's BatchKVCache.

Sequences of different lengths end at the same row, with left padding before them. Joining,
leaving and rolling move rows as they are packed: codes and scales are never made anew, so every
sequence keeps the very rows that it would have on its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask

from .cache import TurboKVCache
from .centre import Centre
from .errors import InputError
from .formats import KVFormat
from .kernels.packed import PaddedCausal
from .kernels.tables import at_least_eight
from .kernels.tiles import Rows, rows_to_tiles, tiles_to_rows
from .layout import TILE, KVLayout
from .packed_cache import PackedCache

STATE_LENGTH = 13


class BatchTurboKVCache(PackedCache):
    """A packed KV cache for one layer and several sequences.

    Args:
        k_format, v_format: formats or their names.
        left_padding: rows before the first token of each sequence.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: what to take out of the keys before they are quantised.

    Raises:
        InputError: an unknown format or back-end.
    """

    def __init__(
        self,
        k_format: KVFormat | str,
        v_format: KVFormat | str,
        left_padding: Sequence[int],
        backend: str | None = None,
        centre: Centre | None = None,
    ) -> None:
        super().__init__(k_format, v_format, backend, centre)
        self._right_padding: list[int] | None = None
        self._pad(left_padding)

    def _pad(self, left_padding: Sequence[int]) -> None:
        self._padding = [int(n) for n in left_padding]
        self._padding_array: mx.array | None = None
        self._starts_array: mx.array | None = None
        self._offset: tuple[int, mx.array] | None = None

    def _row_padding(self) -> tuple[int, ...] | None:
        return tuple(self._padding) if any(self._padding) else None

    @property
    def batch_size(self) -> int:
        """How many sequences."""
        return len(self._padding)

    @property
    def left_padding(self) -> mx.array:
        """Rows before the first token of each sequence; [B] int32."""
        if self._padding_array is None:
            self._padding_array = mx.array(self._padding, mx.int32)
        return self._padding_array

    @property
    def offset(self) -> mx.array:
        """Tokens of each sequence, negative while its padding is still to come; [B] int32."""
        size = self.size()
        if self._offset is None or self._offset[0] != size:
            self._offset = size, mx.array([size - n for n in self._padding], mx.int32)
        return self._offset[1]

    def _check(self, keys: mx.array, values: mx.array) -> None:
        if keys.shape[0] != self.batch_size:
            raise ValueError(
                f"[BatchTurboKVCache] keys {keys.shape} do not fit {self.batch_size} sequences."
            )
        super()._check(keys, values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """The causal mask of the next tokens; without padding it needs no array."""
        size = self.size()
        if not any(self._padding):
            return mlx_lm_cache.create_attention_mask(N, size, return_array, window_size)
        mask = create_causal_mask(
            N, offset=size, window_size=window_size, left_padding=self.left_padding
        )
        if window_size is not None:
            return mask
        mask = PaddedCausal(mask)
        mask.starts = self._starts
        return mask

    @property
    def _starts(self) -> mx.array:
        """The first row of each sequence as kernels take it, made once."""
        if self._starts_array is None:
            self._starts_array = at_least_eight(self.left_padding)
        return self._starts_array

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say how the tokens to come are padded.

        Args:
            left_padding: rows to be added before each sequence.
            lengths: not needed: what is padded follows from the others.
            right_padding: how many of the rows to come are padding, after each sequence's tokens;
                ``finalize`` moves them to the left.

        Raises:
            ValueError: left padding for a cache that holds rows.
        """
        if left_padding is not None:
            if not self.empty():
                raise ValueError(
                    "[BatchTurboKVCache] left padding can only be added to an empty cache."
                )
            self._pad([a + int(b) for a, b in zip(self._padding, left_padding)])
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = [int(n) for n in right_padding]

    def finalize(self) -> None:
        """Turn the right padding that was announced into left padding."""
        padding, self._right_padding = self._right_padding, None
        if padding is None or self.empty():
            return
        n = self.size()
        self._move(padding, [n - p for p in padding], n)
        self._pad([a + b for a, b in zip(self._padding, padding)])

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these sequences, in this order, and drop padding that all of them have."""
        indices = _as_list(batch_indices)
        if not self.empty():
            rows = mx.array(indices)
            self.body = self.body[rows] if self.n_body else None
            self.tail = self.tail[rows] if self.n_tail else None
        self._pad([self._padding[i] for i in indices])
        common = min(self._padding)
        if common <= 0:
            return
        if not self.empty():
            n = self.size()
            self._move([-common] * self.batch_size, [n] * self.batch_size, n - common)
        self._pad([n - common for n in self._padding])

    def extend(self, other: BatchTurboKVCache) -> None:
        """Add the sequences of another batch.

        Raises:
            ValueError: the caches differ in formats or shapes.
        """
        n = max(self.size(), other.size())
        padding = [
            *(p + n - self.size() for p in self._padding),
            *(p + n - other.size() for p in other._padding),
        ]
        self.handles = self.handles and other.handles
        layout = _common_layout([self, other])
        if layout is not None:
            shape = (self if not self.empty() else other).keys.shape[1]
            tiles = [_tiles_ending_at(c, n, layout, shape, c.batch_size) for c in (self, other)]
            self._set_tiles(mx.concatenate(tiles), n, layout)
        self._pad(padding)

    def extract(self, idx: int) -> TurboKVCache:
        """One sequence as a cache of its own.

        Its rows are computed at once: a lazy copy would hold on to the whole batch.
        """
        cache = TurboKVCache(self.k_format, self.v_format, self._backend_name, self.centre)
        cache.handles = self.handles
        padding, n = self._padding[idx], self.size()
        if self.empty() or n <= padding:
            return cache
        tiles = self.packed.tiles[idx : idx + 1]
        tiles = _moved(tiles, self.layout, [-padding], [n], n - padding)
        cache._set_tiles(tiles, n - padding, self.layout)
        mx.async_eval([a for a in (cache.body, cache.tail) if a is not None])
        return cache

    @classmethod
    def merge(cls, caches: Sequence[TurboKVCache]) -> BatchTurboKVCache:
        """A batch of single sequences.

        Raises:
            ValueError: the caches differ in formats or shapes.
        """
        n = max(c.size() for c in caches)
        first = caches[0]
        padding = [n - c.size() for c in caches]
        merged = cls(first.k_format, first.v_format, padding, first._backend_name, first.centre)
        layout = _common_layout(caches)
        merged.handles = all(cache.handles for cache in caches)
        if layout is not None:
            n_heads = next(c.keys.shape[1] for c in caches if not c.empty())
            tiles = [_tiles_ending_at(c, n, layout, n_heads, 1) for c in caches]
            merged._set_tiles(mx.concatenate(tiles), n, layout)
        return merged

    def _move(self, shifts: list[int], ends: list[int], n: int) -> None:
        """Move each sequence's rows by its shift; n rows remain."""
        layout = self.layout
        if n <= 0:
            self._clear()
            return
        self._set_tiles(_moved(self.packed.tiles, layout, shifts, ends, n), n, layout)

    @property
    def state(self) -> list:
        """What saving, loading and evaluation need: arrays and scalars."""
        right = None if self._right_padding is None else mx.array(self._right_padding, mx.int32)
        return [*PackedCache.state.fget(self), self.left_padding, right]

    @state.setter
    def state(self, state: list) -> None:
        if not isinstance(state, (list, tuple)) or len(state) != STATE_LENGTH:
            PackedCache.state.fset(self, state)  # tells another version from no state at all
            raise InputError("This is not the state of a BatchTurboKVCache.")
        PackedCache.state.fset(self, state[:-2])
        left, right = state[-2:]
        self._right_padding = None if right is None else _as_list(right)
        self._pad(_as_list(left))


def _as_list(indices: Sequence[int] | mx.array) -> list[int]:
    return indices.tolist() if isinstance(indices, mx.array) else [int(i) for i in indices]


def _common_layout(caches: Sequence[PackedCache]) -> KVLayout | None:
    """The layout of all caches that hold rows; None if none does."""
    formats = {(c.k_format, c.v_format) for c in caches}
    shapes = {(c.layout, c.keys.shape[1]) for c in caches if not c.empty()}
    if len(formats) > 1 or len(shapes) > 1:
        named = sorted(f"{k}/{v}" for k, v in formats)
        raise ValueError(
            f"[BatchTurboKVCache] caches of different formats or shapes cannot be one batch: "
            f"{', '.join(named)}; {', '.join(str(s) for s in shapes)}."
        )
    if len({c.centre for c in caches}) > 1:
        raise ValueError(
            "[BatchTurboKVCache] caches whose keys are centred differently cannot be one batch."
        )
    return next(iter(shapes))[0] if shapes else None


def _tiles_ending_at(
    cache: PackedCache, n: int, layout: KVLayout, n_heads: int, batch_size: int
) -> mx.array:
    """The tiles of a cache's newest n rows, the last at n - 1; zeros where it has none."""
    if cache.empty():
        return mx.zeros((batch_size, n_heads, -(-n // TILE), layout.tile_words), mx.uint32)
    held = cache.n_rows
    return _moved(cache.packed.tiles, layout, [n - held] * batch_size, [held] * batch_size, n)


def _moved(
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
    ends = mx.minimum(mx.array(ends), n - mx.array(shifts))
    valid = mx.logical_and(rows >= 0, rows < ends[:, None])[:, None, :, None]
    rows = mx.clip(rows, 0, tiles.shape[2] * TILE - 1)[:, None, :, None]

    def move(part: mx.array) -> mx.array:
        if part.shape[-1] == 0:
            return mx.zeros((*part.shape[:2], n_tiles * TILE, 0), part.dtype)
        taken = mx.take_along_axis(part, rows, axis=2)
        return mx.where(valid, taken, mx.zeros((), part.dtype))

    return rows_to_tiles(Rows(*map(move, tiles_to_rows(tiles, layout))), layout)


def _moved_tiles(tiles: mx.array, shifts: list[int], n_tiles: int) -> mx.array:
    """``_moved`` by whole tiles: nothing needs to be unpacked."""
    index = mx.arange(n_tiles)[None] - mx.array(shifts)[:, None]
    taken = mx.take_along_axis(
        tiles, mx.clip(index, 0, tiles.shape[2] - 1)[:, None, :, None], axis=2
    )
    return mx.where((index >= 0)[:, None, :, None], taken, mx.array(0, mx.uint32))


mlx_lm_cache.BatchTurboKVCache = BatchTurboKVCache  # load_prompt_cache looks classes up there
