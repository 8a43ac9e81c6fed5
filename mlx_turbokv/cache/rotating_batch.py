"""BatchTurboRotatingKVCache: a packed sliding window of several sequences.

A drop-in for mlx-lm's BatchRotatingKVCache. Sequences end at the same row, with left padding before
those that hold fewer; rows move as they are packed. As in mlx-lm, no first tokens are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from ..kernels.packed import PaddedCausal
from ..log import warn_once
from ..quant.formats import KVFormat
from ..quant.layout import KVLayout
from .base import PackedCache, loadable
from .padding import PaddedBatch, common_layout
from .rotating import RotatingRows, TurboRotatingKVCache
from .state import MOST, count, counts


@loadable
class BatchTurboRotatingKVCache(PaddedBatch, RotatingRows):
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
        self._set_left_padding(left_padding)
        self._n_dropped = [0] * len(self._left_padding)
        self._ends: list[int] | None = None

    @property
    def offset(self) -> mx.array:
        """Tokens of each sequence, negative while its padding is still to come; [B] int32."""
        return mx.array(self._offsets(), mx.int32)

    def _offsets(self) -> list[int]:
        n = self.n_rows
        return [n - padding + gone for padding, gone in zip(self._left_padding, self._n_dropped)]

    def size(self) -> int:
        """Rows in the window, padding included."""
        return min(self.n_rows, self.max_size)

    def make_mask(self, n: int, window_size: int | None = None, return_array: bool = False):
        """The mask of the next tokens; one token that sees all that is held needs no array."""
        hidden = self._n_hidden_next()
        n_before = self.n_rows - hidden
        window_size = window_size or self.max_size
        padded = any(padding > hidden for padding in self._left_padding)
        if n == 1 and not padded and not return_array and n_before < window_size:
            return None
        padding = mx.array([padding - hidden for padding in self._left_padding], mx.int32)
        mask = create_causal_mask(n, n_before, window_size=window_size, left_padding=padding)
        if n > 1 or n_before >= window_size:
            return mask
        mask = PaddedCausal(mask)
        mask.left_padding = mx.array([max(0, p - hidden) for p in self._left_padding], mx.int32)
        return mask

    def _append(self, keys: mx.array, values: mx.array) -> None:
        self._roll()
        super()._append(keys, values)

    def _count_dropped(self, n: int) -> None:
        tokens = [max(0, n - padding) for padding in self._left_padding]
        self._n_dropped = [a + b for a, b in zip(self._n_dropped, tokens)]
        self._set_left_padding([max(0, p - n) for p in self._left_padding])

    def _set_right_padding(self, lengths: Sequence[int] | None, right_padding: list[int]) -> None:
        if lengths is None:
            raise ValueError("[BatchTurboRotatingKVCache] right padding is given without lengths.")
        self._ends = [int(n) + offset for n, offset in zip(lengths, self._offsets())]

    def finalize(self) -> None:
        """Turn the right padding into left padding."""
        self._roll()
        self._ends = None

    def _roll(self) -> None:
        """Move sequences that end in padding to the right."""
        if self._ends is None or self.layout is None:
            return
        shifts = [max(0, offset - end) for offset, end in zip(self._offsets(), self._ends)]
        if any(shifts):
            n = self.n_rows
            self._move(shifts, [n - shift for shift in shifts], n)
            self._set_left_padding([a + b for a, b in zip(self._left_padding, shifts)])

    def _move(self, shifts: list[int], ends: list[int], n: int) -> None:
        super()._move(shifts, ends, n)
        self.n_hidden = min(self.n_hidden, self.n_rows)

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be taken off the end: no window has moved on."""
        return self.n_rows < self.max_size and not any(self._n_dropped)

    def trim(self, n: int) -> int:
        """Take up to ``n`` rows off the end of every sequence; returns how many.

        Raises:
            ValueError: tokens that a window would need have been dropped.
        """
        asked, n = n, min(self.n_rows, n)
        for padding, offset in zip(self._left_padding, self._offsets()):
            if self.n_rows - padding - n < min(offset - n, self.max_size - 1):
                raise ValueError(
                    f"[BatchTurboRotatingKVCache] {asked} tokens cannot be taken back: the window "
                    f"of {self.max_size} has moved on, and older tokens are gone."
                )
        super().trim(n)
        self.n_hidden = min(self.n_hidden, self._n_hidden_next())
        return n

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these sequences, in this order, and drop padding that all of them have."""
        before, hidden = self.n_rows, self.n_hidden
        super().filter(batch_indices)
        self.n_hidden = min(max(0, hidden - (before - self.n_rows)), self.n_rows)

    def _select(self, indices: list[int]) -> None:
        super()._select(indices)
        self._n_dropped = [self._n_dropped[i] for i in indices]
        self._ends = None if self._ends is None else [self._ends[i] for i in indices]

    def extend(self, other: BatchTurboRotatingKVCache) -> None:
        """Add the sequences of another batch.

        Raises:
            ValueError: the caches differ in formats, shapes or windows.
        """
        layout = _layout_of([self, other])
        n = max(self.n_rows, other.n_rows)
        padding = [p + n - cache.n_rows for cache in (self, other) for p in cache._left_padding]
        self._hold_newest([self, other], n, layout)
        self._set_left_padding(padding)
        self._n_dropped = self._n_dropped + other._n_dropped
        self._ends = None
        self.n_hidden = max(0, n - self.max_size)

    def extract(self, idx: int) -> PackedCache:
        """One sequence as a cache of its own; its rows are computed at once."""
        cache = super().extract(idx)
        if isinstance(cache, TurboRotatingKVCache) and not cache.empty():
            cache.n_dropped = self._n_dropped[idx]
            cache.n_hidden = max(0, self.n_hidden - self._left_padding[idx])
        return cache

    def _new_single(self) -> TurboRotatingKVCache:
        formats = self.k_format, self.v_format
        return TurboRotatingKVCache(*formats, self.max_size, 0, self._backend_name)

    @classmethod
    def merge(cls, caches: Sequence[TurboRotatingKVCache]) -> BatchTurboRotatingKVCache:
        """A batch of single sequences.

        Raises:
            ValueError: the caches differ in formats, shapes or windows.
        """
        first, layout = caches[0], _layout_of(caches)
        if any(cache.keep for cache in caches):
            warn_once("A batch keeps no first tokens: as in mlx-lm, they leave with the window.")
        # what lies between kept tokens and the window is gone, so the kept ones go as well
        skipped = [c.keep + c._n_unreachable() if c.n_dropped else 0 for c in caches]
        held = [c.n_rows - skip for c, skip in zip(caches, skipped)]
        n = max(held)
        padding = [n - rows for rows in held]
        merged = cls(first.k_format, first.v_format, first.max_size, padding, first._backend_name)
        merged._hold_newest(caches, n, layout)
        merged._n_dropped = [c.n_dropped + skip for c, skip in zip(caches, skipped)]
        merged.n_hidden = max(0, n - first.max_size)
        return merged

    def _extra_state(self) -> list:
        ends = None if self._ends is None else mx.array(self._ends, mx.int32)
        dropped = mx.array(self._n_dropped, mx.int32)
        return [self.max_size, self.n_hidden, self.left_padding, dropped, ends]

    def _set_extra_state(self, extra: list) -> None:
        max_size, n_hidden, padding, dropped, ends = extra
        self.keep, self.max_size = 0, count(max_size, "max_size", 1)
        self.n_hidden = count(n_hidden, "n_hidden", 0, self.n_rows)
        n = None if self.layout is None else self.newest.shape[0]
        padding = counts(padding, "left padding", n)
        self._set_left_padding(padding)
        self._n_dropped = counts(dropped, "n_dropped", len(padding))
        self._ends = None
        if ends is not None:
            self._ends = counts(ends, "ends of sequences", len(padding), -MOST)


def _layout_of(caches: Sequence[RotatingRows]) -> KVLayout | None:
    """The layout of all caches that hold rows; None if none does."""
    windows = sorted({cache.max_size for cache in caches})
    if len(windows) > 1:
        raise ValueError(
            "[BatchTurboRotatingKVCache] caches of different windows cannot be one batch: "
            f"{', '.join(map(str, windows))} tokens."
        )
    return common_layout(caches)


TurboRotatingKVCache.batch_class = BatchTurboRotatingKVCache
