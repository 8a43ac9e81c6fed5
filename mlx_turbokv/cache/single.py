"""TurboKVCache: packed K and V of one layer, a drop-in for mlx-lm's KVCache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import create_attention_mask

from .base import PackedCache, loadable
from .padding import PaddedBatch


@loadable
class TurboKVCache(PackedCache):
    """A packed KV cache for one layer.

    Without recent tokens to protect, rows are quantised before attention reads them, so what it
    reads does not depend on how a prompt was cut. With them, more than 8 new tokens at a time see
    each other as the model made them.

    Args:
        k_format, v_format: formats or their names.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: what to subtract from the keys before they are quantised.
        sink: tokens at a sequence's start that are stored in 8.5 bits; a multiple of 32.
        recent: tokens at its end that are, at least; a multiple of 32.

    Raises:
        InputError: an unknown format or back-end, or a number of tokens that is not accepted.
    """

    batch_class: type[PaddedBatch]  # set by batch.py

    @property
    def offset(self) -> int:
        """Tokens in the cache."""
        return self.n_rows

    def make_mask(self, *args, **kwargs):
        """The causal mask of the next tokens; before the update, as mlx-lm calls it."""
        return create_attention_mask(*args, offset=self.offset, **kwargs)

    def to_batch(self, left_padding: Sequence[int]) -> PaddedBatch:
        """An empty batch of the same formats, as mlx-vlm asks for it."""
        kind: Any = self.batch_class
        formats, options = (self.k_format, self.v_format), (self._backend_name, self.centre)
        batch = kind(*formats, left_padding, *options, **vars(self.protection))
        batch.handles = self.handles
        return batch

    @classmethod
    def merge(cls, caches: Sequence[TurboKVCache]) -> PaddedBatch:
        """One batch of the sequences of several caches.

        Raises:
            ValueError: the caches differ in formats or shapes.
        """
        return cls.batch_class.merge(caches)
