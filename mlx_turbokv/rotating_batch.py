"""BatchTurboRotatingKVCache: a packed sliding window of several sequences.

A drop-in for mlx-lm's BatchRotatingKVCache. Sequences end at the same row, with left padding before
those that hold fewer; rows move as they are packed. As in mlx-lm, no first tokens are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask

from .batch_cache import _as_list, _common_layout, _moved, _tiles_ending_at
from .errors import InputError
from .formats import KVFormat
from .kernels.packed import PaddedCausal
from .kernels.tables import at_least_eight
from .layout import KVLayout
from .packed_cache import PackedCache
from .rotating_cache import RotatingRows, TurboRotatingKVCache

STATE_EXTRA = 5
logger = logging.getLogger("mlx_turbokv")
_said: set[str] = set()


class BatchTurboRotatingKVCache(RotatingRows):
    """A packed KV cache for one layer with a sliding window, and several sequences.

    Args:
        k_format, v_format: formats or their names.
        max_size: tokens of the window, the newest included.
        left_padding: rows before the first token of each sequence.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.

    Raises:
        InputError: an unknown format or back-end, or a window that is not accepted.
    """

    def __init__(
        self,
        k_format: KVFormat | str,
        v_format: KVFormat | str,
        max_size: int,
        left_padding: Sequence[int],
        backend: str | None = None,
    ) -> None:
        super().__init__(k_format, v_format, max_size, 0, backend)
        self._padding = [int(n) for n in left_padding]
        self._gone = [0] * len(self._padding)
        self._ends: list[int] | None = None

    @property
    def batch_size(self) -> int:
        """How many sequences."""
        return len(self._padding)

    @property
    def left_padding(self) -> mx.array:
        """Rows before the first held token of each sequence; [B] int32."""
        return mx.array(self._padding, mx.int32)

    @property
    def offset(self) -> mx.array:
        """Tokens of each sequence, negative while its padding is still to come; [B] int32."""
        return mx.array(self._offsets(), mx.int32)

    def _offsets(self) -> list[int]:
        n = self.n_rows
        return [n - padding + gone for padding, gone in zip(self._padding, self._gone)]

    def size(self) -> int:
        """Rows in the window, padding included."""
        return min(self.n_rows, self.max_size)

    def _check(self, keys: mx.array, values: mx.array) -> None:
        if keys.shape[0] != self.batch_size:
            raise ValueError(
                f"[BatchTurboRotatingKVCache] keys {keys.shape} do not fit {self.batch_size} "
                "sequences."
            )
        super()._check(keys, values)

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):
        """The mask of the next tokens; one token that sees all that is held needs no array."""
        hidden = self._hidden_next()
        n_before = self.n_rows - hidden
        window_size = window_size or self.max_size
        padded = any(padding > hidden for padding in self._padding)
        if N == 1 and not padded and not return_array and n_before < window_size:
            return None
        padding = mx.array([padding - hidden for padding in self._padding], mx.int32)
        mask = create_causal_mask(N, n_before, window_size=window_size, left_padding=padding)
        if N > 1 or n_before >= window_size:
            return mask
        mask = PaddedCausal(mask)
        firsts = [max(0, padding - hidden) for padding in self._padding]
        mask.starts = at_least_eight(mx.array(firsts, mx.int32))
        return mask

    def _append(self, keys: mx.array, values: mx.array) -> None:
        self._roll()
        super()._append(keys, values)

    def _forget(self, n: int) -> None:
        self._gone = [gone + max(0, n - p) for gone, p in zip(self._gone, self._padding)]
        self._padding = [max(0, p - n) for p in self._padding]

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
            lengths: how many tokens of each sequence are to come; needed with ``right_padding``.
            right_padding: how many rows of padding follow them; they are moved to the left before
                they can push a token out of the window, at last by ``finalize``.

        Raises:
            ValueError: left padding for a cache that holds rows.
        """
        if left_padding is not None:
            if not self.empty():
                raise ValueError(
                    "[BatchTurboRotatingKVCache] left padding can only be added to an empty cache."
                )
            self._padding = [a + int(b) for a, b in zip(self._padding, left_padding)]
        if right_padding is not None and max(right_padding) > 0:
            self._ends = [int(n) + offset for n, offset in zip(lengths, self._offsets())]

    def finalize(self) -> None:
        """Turn the right padding that was announced into left padding."""
        self._roll()
        self._ends = None

    def _roll(self) -> None:
        """Move sequences that end in padding to the right."""
        if self._ends is None or self.empty():
            return
        shifts = [max(0, offset - end) for offset, end in zip(self._offsets(), self._ends)]
        if any(shifts):
            n = self.n_rows
            self._move(shifts, [n - shift for shift in shifts], n)
            self._padding = [a + b for a, b in zip(self._padding, shifts)]

    def _move(self, shifts: list[int], ends: list[int], n: int) -> None:
        """Move each sequence's rows by its shift; n rows remain."""
        layout, hidden = self.layout, self.n_hidden
        if n <= 0:
            self._clear()
            return
        self._set_tiles(_moved(self.packed.tiles, layout, shifts, ends, n), n, layout)
        self.n_hidden = min(hidden, n)

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be taken off the end: no window has moved on."""
        return self.n_rows < self.max_size and not any(self._gone)

    def trim(self, n: int) -> int:
        """Take up to ``n`` rows off the end of every sequence; returns how many.

        Raises:
            ValueError: tokens that a window would need have been dropped.
        """
        asked, n = n, min(self.n_rows, n)
        for padding, offset in zip(self._padding, self._offsets()):
            if self.n_rows - padding - n < min(offset - n, self.max_size - 1):
                raise ValueError(
                    f"[BatchTurboRotatingKVCache] {asked} tokens cannot be taken back: the window of "
                    f"{self.max_size} has moved on, and older tokens are gone."
                )
        super().trim(n)
        self.n_hidden = min(self.n_hidden, self._hidden_next())
        return n

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these sequences, in this order, and drop padding that all of them have."""
        indices = _as_list(batch_indices)
        if not self.empty():
            rows = mx.array(indices)
            self.body = self.body[rows] if self.n_body else None
            self.tail = self.tail[rows] if self.n_tail else None
        self._padding = [self._padding[i] for i in indices]
        self._gone = [self._gone[i] for i in indices]
        self._ends = None if self._ends is None else [self._ends[i] for i in indices]
        common = min(self._padding)
        if common <= 0:
            return
        if not self.empty():
            n = self.n_rows
            hidden = max(0, self.n_hidden - common)
            self._move([-common] * self.batch_size, [n] * self.batch_size, n - common)
            self.n_hidden = min(hidden, self.n_rows)
            common = min(common, n)
        self._padding = [n - common for n in self._padding]

    def extend(self, other: BatchTurboRotatingKVCache) -> None:
        """Add the sequences of another batch.

        Raises:
            ValueError: the caches differ in formats, shapes or windows.
        """
        self.handles = self.handles and other.handles
        layout = _layout_of([self, other])
        n = max(self.n_rows, other.n_rows)
        padding = [p + n - cache.n_rows for cache in (self, other) for p in cache._padding]
        if layout is not None:
            n_heads = (self if not self.empty() else other).keys.shape[1]
            tiles = [_tiles_ending_at(c, n, layout, n_heads, c.batch_size) for c in (self, other)]
            self._set_tiles(mx.concatenate(tiles), n, layout)
        self._padding, self._gone = padding, self._gone + other._gone
        self._ends = None
        self.n_hidden = max(0, n - self.max_size)

    def extract(self, idx: int) -> TurboRotatingKVCache:
        """One sequence as a cache of its own.

        Its rows are computed at once: a lazy copy would hold on to the whole batch.
        """
        cache = TurboRotatingKVCache(
            self.k_format, self.v_format, self.max_size, 0, self._backend_name
        )
        cache.handles = self.handles
        padding, n = self._padding[idx], self.n_rows
        if self.empty() or n <= padding:
            return cache
        tiles = self.packed.tiles[idx : idx + 1]
        tiles = _moved(tiles, self.layout, [-padding], [n], n - padding)
        cache._set_tiles(tiles, n - padding, self.layout)
        cache.n_gone = self._gone[idx]
        cache.n_hidden = max(0, self.n_hidden - padding)
        mx.async_eval([a for a in (cache.body, cache.tail) if a is not None])
        return cache

    @classmethod
    def merge(cls, caches: Sequence[TurboRotatingKVCache]) -> BatchTurboRotatingKVCache:
        """A batch of single sequences.

        Raises:
            ValueError: the caches differ in formats, shapes or windows.
        """
        first, layout = caches[0], _layout_of(caches)
        if any(cache.keep for cache in caches):
            _say_once("A batch keeps no first tokens: as in mlx-lm, they leave with the window.")
        # what lies between kept tokens and the window is gone, so the kept ones go as well
        skipped = [c.keep + c._lost() if c.n_gone else 0 for c in caches]
        held = [c.n_rows - skip for c, skip in zip(caches, skipped)]
        n = max(held)
        padding = [n - rows for rows in held]
        merged = cls(first.k_format, first.v_format, first.max_size, padding, first._backend_name)
        merged.handles = all(cache.handles for cache in caches)
        if layout is not None:
            n_heads = next(c.keys.shape[1] for c in caches if not c.empty())
            tiles = [_tiles_ending_at(c, n, layout, n_heads, 1) for c in caches]
            merged._set_tiles(mx.concatenate(tiles), n, layout)
        merged._gone = [c.n_gone + skip for c, skip in zip(caches, skipped)]
        merged.n_hidden = max(0, n - first.max_size)
        return merged

    @property
    def state(self) -> list:
        """What saving, loading and evaluation need: arrays and scalars."""
        ends = None if self._ends is None else mx.array(self._ends, mx.int32)
        gone = mx.array(self._gone, mx.int32)
        extra = [self.max_size, self.n_hidden, self.left_padding, gone, ends]
        return [*PackedCache.state.fget(self), *extra]

    @state.setter
    def state(self, state: list) -> None:
        is_list = isinstance(state, (list, tuple)) and len(state) > STATE_EXTRA
        extra = state[-STATE_EXTRA:] if is_list else [None] * STATE_EXTRA
        if not isinstance(extra[2], mx.array) or not isinstance(extra[3], mx.array):
            PackedCache.state.fset(self, state)  # tells another version from no state at all
            raise InputError("This is not the state of a BatchTurboRotatingKVCache.")
        PackedCache.state.fset(self, state[:-STATE_EXTRA])
        self.keep = 0
        self.max_size, self.n_hidden, padding, gone, ends = extra
        self._padding, self._gone = _as_list(padding), _as_list(gone)
        self._ends = None if ends is None else _as_list(ends)


def _layout_of(caches: Sequence[RotatingRows]) -> KVLayout | None:
    """The layout of all caches that hold rows; None if none does."""
    windows = sorted({cache.max_size for cache in caches})
    if len(windows) > 1:
        raise ValueError(
            "[BatchTurboRotatingKVCache] caches of different windows cannot be one batch: "
            f"{', '.join(map(str, windows))} tokens."
        )
    return _common_layout(caches)


def _say_once(note: str) -> None:
    if note not in _said:
        _said.add(note)
        logger.warning(note)


mlx_lm_cache.BatchTurboRotatingKVCache = BatchTurboRotatingKVCache  # load_prompt_cache looks there
