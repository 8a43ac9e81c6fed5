"""TurboKVCache: packed K and V of one layer, a drop-in for mlx-lm's KVCache.

Rows are quantised when they are written, before attention reads them, so what attention sees does
not depend on how a prompt was cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.models import cache as mlx_lm_cache

from .base import PackedCache
from .padding import PaddedBatch


class TurboKVCache(PackedCache):
    """A packed KV cache for one layer.

    Args:
        k_format, v_format: formats or their names.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: what to take out of the keys before they are quantised.

    Raises:
        InputError: an unknown format or back-end.
    """

    batch_class: type[PaddedBatch]  # set by batch.py

    @property
    def offset(self) -> int:
        """Tokens in the cache."""
        return self.n_body + self.n_tail

    def make_mask(self, *args, **kwargs):
        """The causal mask of the next tokens; before the update, as mlx-lm calls it."""
        return mlx_lm_cache.create_attention_mask(*args, offset=self.offset, **kwargs)

    @classmethod
    def merge(cls, caches: Sequence[TurboKVCache]) -> PaddedBatch:
        """One batch of the sequences of several caches.

        Raises:
            ValueError: the caches differ in formats or shapes.
        """
        return cls.batch_class.merge(caches)


mlx_lm_cache.TurboKVCache = TurboKVCache  # load_prompt_cache looks classes up there
