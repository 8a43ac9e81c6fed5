"""What packed batches share: sequences that end at the same row, with left padding before them.

Merging, filtering and shifting move packed rows and never requantise them, so every sequence keeps
the rows that it would have on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..quant.layout import KVLayout
from .base import PackedCache
from .regrid import Part


class PaddedBatch(PackedCache):
    """Packed K and V of one layer and several sequences. Its kinds say what else they count."""

    def _set_left_padding(self, left_padding: Sequence[int]) -> None:
        self._left_padding = [int(n) for n in left_padding]
        self._left_padding_array: mx.array | None = None

    @property
    def batch_size(self) -> int:
        """How many sequences."""
        return len(self._left_padding)

    @property
    def left_padding(self) -> mx.array:
        """Rows before the first token of each sequence; [B] int32."""
        if self._left_padding_array is None:
            self._left_padding_array = mx.array(self._left_padding, mx.int32)
        return self._left_padding_array

    @left_padding.setter
    def left_padding(self, left_padding: mx.array) -> None:
        self._set_left_padding(as_list(left_padding))

    def empty(self) -> bool:
        """Whether nothing has been written, and no padding was announced.

        mlx-vlm goes on with caches of its own where a batch is empty, without these formats.
        """
        return self.layout is None and not any(self._left_padding)

    @property
    def starts(self) -> list[int]:
        return list(self._left_padding)

    def _may_return_handles(self) -> bool:
        handles = self.handles
        is_read = handles is not None and not handles.padded and any(self._left_padding)
        return not is_read and super()._may_return_handles()

    def _check(self, keys: mx.array, values: mx.array) -> None:
        if keys.shape[0] != self.batch_size:
            raise ValueError(
                f"[{type(self).__name__}] keys {keys.shape} do not fit {self.batch_size} sequences."
            )
        super()._check(keys, values)

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
            lengths: how many tokens of each sequence are to come; windows need it with
                ``right_padding``.
            right_padding: how many of the rows to come are padding, after each sequence's tokens;
                they are moved to the left, at last by ``finalize``.

        Raises:
            ValueError: left padding for a cache that holds rows.
        """
        if left_padding is not None:
            if self.layout is not None:
                raise ValueError(
                    f"[{type(self).__name__}] left padding can only be added to an empty cache."
                )
            self._set_left_padding([a + int(b) for a, b in zip(self._left_padding, left_padding)])
        if right_padding is not None and max(right_padding) > 0:
            self._set_right_padding(lengths, [int(n) for n in right_padding])

    def _set_right_padding(self, lengths: Sequence[int] | None, right_padding: list[int]) -> None:
        """Remember the right padding of the rows to come."""
        raise NotImplementedError

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these sequences, in this order, and drop padding that all of them have."""
        indices = as_list(batch_indices)
        if self.layout is not None:
            rows = mx.array(indices)
            self._take_sequences(rows, indices)
        self._select(indices)
        common = min(self._left_padding)
        if common <= 0:
            return
        if self.layout is not None:
            common, n = min(common, self.n_rows), self.n_rows
            self._move([-common] * self.batch_size, [n] * self.batch_size, n - common)
        self._set_left_padding([n - common for n in self._left_padding])

    def _select(self, indices: list[int]) -> None:
        """Keep what is counted of these sequences."""
        self._set_left_padding([self._left_padding[i] for i in indices])

    def extract(self, idx: int) -> PackedCache:
        """One sequence as a cache of its own.

        Its rows are computed at once: a lazy copy would hold on to the whole batch.
        """
        cache = self._new_single()
        cache.handles = self.handles
        padding, n = self._left_padding[idx], self.n_rows
        if self.layout is None or n <= padding:
            return cache
        part = Part(self, [-padding], [n], idx)
        cache._hold([part], n - padding, self.layout)
        mx.async_eval(cache.body, cache.tail, cache.segments.sink)
        return cache

    def _new_single(self) -> PackedCache:
        """An empty cache of one sequence."""
        raise NotImplementedError

    def _hold_newest(self, caches: Sequence[PackedCache], n: int, layout: KVLayout | None) -> None:
        """Hold the newest n rows of these caches, ending at the same row; None if all are empty."""
        given = [cache.handles for cache in caches]
        self.handles = None if None in given else given[0]
        if layout is None:
            return
        parts = []
        for cache in caches:
            held, batch_size = cache.n_rows, getattr(cache, "batch_size", 1)
            parts.append(Part(cache, [n - held] * batch_size, [held] * batch_size))
        self._hold(parts, n, layout)

    def _move(self, shifts: list[int], ends: list[int], n: int) -> None:
        """Move each sequence's rows by its shift; n rows remain."""
        layout = self.layout
        if layout is None or n <= 0:
            self._clear()
            return
        self._hold([Part(self, shifts, ends)], n, layout)

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> PaddedBatch:
        """A batch of single sequences."""
        raise NotImplementedError


def as_list(indices: Sequence[int] | mx.array) -> list[int]:
    """Numbers of an array or a sequence."""
    numbers: Any = indices.tolist() if isinstance(indices, mx.array) else indices
    return [int(i) for i in numbers]


def common_layout(caches: Sequence[Any]) -> KVLayout | None:
    """The layout of all caches that hold rows; None if none does.

    Raises:
        ValueError: the caches differ in class, formats, shapes or centres.
    """
    for cache in caches:
        if not isinstance(cache, PackedCache):
            raise ValueError(
                f"[batch] a {type(cache).__name__} cannot be in one batch with packed caches; it "
                "was made before the packed cache was attached, or for another model."
            )
    formats = {(c.k_format, c.v_format) for c in caches}
    held = [(c.layout, c.newest.shape[1]) for c in caches if c.layout is not None]
    shapes = {(_stored_layout(layout), n_heads) for layout, n_heads in held}
    if len(formats) > 1 or len(shapes) > 1:
        named = sorted(f"{k}/{v}" for k, v in formats)
        raise ValueError(
            f"[batch] caches of different formats or shapes cannot be one batch: "
            f"{', '.join(named)}; {', '.join(str(s) for s in shapes)}."
        )
    if len({c.protection for c in caches}) > 1:
        raise ValueError(
            "[batch] caches of different numbers of protected tokens cannot be one batch."
        )
    if len({c.centre for c in caches}) > 1:
        raise ValueError("[batch] caches whose keys are centred differently cannot be one batch.")
    return held[0][0] if held else None


def _stored_layout(layout: KVLayout) -> KVLayout:
    """A layout without the model's dtype, unless rows are stored in it."""
    return layout if layout.is_raw else replace(layout, dtype="float32")
