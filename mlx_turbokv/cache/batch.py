"""BatchTurboKVCache: packed K and V of a batch of sequences, a drop-in for mlx-lm's BatchKVCache.

Sequences of different lengths end at the same row, with left padding before them
(padding.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import create_attention_mask

from ..centring.centre import Centre
from ..kernels.packed import PaddedCausal
from ..quant.formats import KVFormat
from .base import loadable
from .padding import PaddedBatch, as_list, common_layout
from .single import TurboKVCache
from .state import counts


@loadable
class BatchTurboKVCache(PaddedBatch):
    """A packed KV cache for one layer and several sequences.

    Args:
        k_format, v_format: formats or their names.
        left_padding: rows before the first token of each sequence.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: what to take out of the keys before they are quantised.
        sink, recent: tokens of each sequence that are protected, as ``TurboKVCache`` takes them.

    Raises:
        InputError: as ``TurboKVCache``.
    """

    single_class: type[TurboKVCache] = TurboKVCache  # of one of its sequences

    def __init__(
        self,
        k_format: KVFormat | str,
        v_format: KVFormat | str,
        left_padding: Sequence[int],
        backend: str | None = None,
        centre: Centre | None = None,
        sink: int = 0,
        recent: int = 0,
    ) -> None:
        super().__init__(k_format, v_format, backend, centre, sink, recent)
        self._right_padding: list[int] | None = None
        self._coming: list[int] | None = None
        self._set_left_padding(left_padding)

    def _set_left_padding(self, left_padding: Sequence[int]) -> None:
        super()._set_left_padding(left_padding)
        self._offset_at: tuple[int, mx.array] | None = None

    def _position_padding(self) -> mx.array | None:
        return self.left_padding if any(self._left_padding) else None

    @property
    def offset(self) -> mx.array:
        """Tokens of each sequence, negative while its padding is still to come; [B] int32."""
        size = self.size()
        if self._offset_at is None or self._offset_at[0] != size:
            self._offset_at = size, mx.array([size - n for n in self._left_padding], mx.int32)
        return self._offset_at[1]

    @offset.setter
    def offset(self, offset: mx.array) -> None:
        """Set how many rows are padding, as mlx-vlm does for padding that is still to come."""
        self._set_left_padding([self.size() - n for n in as_list(offset)])

    @property
    def _idx(self) -> int:
        """Rows held, padding included, where models of mlx-vlm look for them."""
        return self.size()

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None):
        """The causal mask of the next tokens; without padding it needs no array."""
        size = self.size()
        if not any(self._left_padding):
            return create_attention_mask(n, size, return_array, window_size)
        mask = create_causal_mask(
            n, offset=size, window_size=window_size, left_padding=self.left_padding
        )
        if window_size is not None:
            return mask
        mask = PaddedCausal(mask)
        mask.left_padding = self.left_padding
        return mask

    def _set_right_padding(self, lengths: Sequence[int] | None, right_padding: list[int]) -> None:
        self._right_padding = right_padding
        # where the sequences end; without lengths it is not known how many rows are still to come
        self._coming = None if lengths is None else [self.n_rows + int(n) for n in lengths]

    def _ends(self, n: int) -> list[int]:
        if self._right_padding is None:
            return [n]
        if self._coming is None:
            return [n - padding for padding in self._right_padding]
        return [min(n, end) for end in self._coming]

    def _select(self, indices: list[int]) -> None:
        super()._select(indices)
        if self._right_padding is not None:
            self._right_padding = [self._right_padding[i] for i in indices]
        if self._coming is not None:
            self._coming = [self._coming[i] for i in indices]

    def finalize(self) -> None:
        """Turn the right padding into left padding."""
        padding, self._right_padding, self._coming = self._right_padding, None, None
        if padding is None or self.layout is None:
            return
        n = self.size()
        self._move(padding, [n - p for p in padding], n)
        self._set_left_padding([a + b for a, b in zip(self._left_padding, padding)])

    def extend(self, other: BatchTurboKVCache) -> None:
        """Add the sequences of another batch.

        Raises:
            ValueError: the caches differ in formats or shapes.
        """
        layout = common_layout([self, other])
        n = max(self.size(), other.size())
        padding = [p + n - cache.size() for cache in (self, other) for p in cache._left_padding]
        self._hold_newest([self, other], n, layout)
        self._set_left_padding(padding)

    def _new_single(self) -> TurboKVCache:
        options = self._backend_name, self.centre
        return self.single_class(self.k_format, self.v_format, *options, **vars(self.protection))

    @classmethod
    def merge(cls, caches: Sequence[TurboKVCache]) -> BatchTurboKVCache:
        """A batch of single sequences.

        Raises:
            ValueError: the caches differ in formats or shapes.
        """
        layout, first = common_layout(caches), caches[0]
        n = max(c.size() for c in caches)
        padding = [n - c.size() for c in caches]
        options = padding, first._backend_name, first.centre
        merged = cls(first.k_format, first.v_format, *options, **vars(first.protection))
        merged._hold_newest(caches, n, layout)
        return merged

    def _extra_state(self) -> list:
        right = None if self._right_padding is None else mx.array(self._right_padding, mx.int32)
        return [self.left_padding, right]

    def _set_extra_state(self, extra: list) -> None:
        left, right = extra
        n = None if self.layout is None else self.newest.shape[0]
        left = counts(left, "left padding", n)
        self._right_padding = self._coming = None
        if right is not None:
            self._right_padding = counts(right, "right padding", len(left))
        self._set_left_padding(left)


TurboKVCache.batch_class = BatchTurboKVCache
