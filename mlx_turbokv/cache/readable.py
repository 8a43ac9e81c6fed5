"""ReadableTurboKVCache: a packed cache for models that take K and V out of the cache themselves."""

from __future__ import annotations

import mlx.core as mx

from .base import loadable
from .single import TurboKVCache


@loadable
class ReadableTurboKVCache(TurboKVCache):
    """A packed KV cache whose rows a model reads beside the tokens that it is still writing.

    Diffusion models of mlx-vlm attend over the cache and a block of tokens that is not in it yet.
    Each read dequantises the rows anew; the arrays live as long as the reader holds them.
    """

    @property
    def keys(self) -> mx.array | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All keys, [B, H, n, k_head_dim], dequantised lazily; None while there are none."""
        return None if self.empty() else self.keys_and_values()[0]

    @property
    def values(self) -> mx.array | None:
        """All values, [B, H, n, v_head_dim], as ``keys``."""
        return None if self.empty() else self.keys_and_values()[1]

    @property
    def decoder_state(self) -> tuple[mx.array | None, mx.array | None]:
        """Keys and values, by the name that decoders of mlx-vlm ask for."""
        return (None, None) if self.empty() else self.keys_and_values()

    def _may_return_handles(self) -> bool:
        return False  # the same model may compute its attention by itself, from arrays
