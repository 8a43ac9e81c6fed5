"""The first piece of a prompt, computed once for all configurations that read it as it was made.

Where newest tokens are protected, tokens of one piece see each other as the model made them, so a
first piece gives the same keys and values with any such configuration as with f16.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..cache.single import TurboKVCache
from ..cache.summary import leaves
from ..kernels.decode import MAX_QUERIES


class FirstPiece:
    """Reads one piece of tokens into empty caches, again and again.

    Args:
        model: a model of mlx-lm.

    The keys and values of the first caches that are mlx-lm's own ``KVCache`` in every layer are
    kept. Caches that would be given the same take them; for others the model runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._rows: list[tuple[mx.array, mx.array]] = []

    def read(self, tokens: mx.array, caches: list[Any]) -> None:
        """Read the piece, the same at every call, into empty caches.

        Shapes:
            tokens: [B, n].
        """
        parts = list(leaves(caches))
        if self._rows and all(map(_reads_as_made, parts)):
            for cache, (keys, values) in zip(parts, self._rows):
                cache.update_and_fetch(keys, values)
        else:
            self.model(tokens, cache=caches)
            if tokens.shape[1] > MAX_QUERIES and all(type(c) is KVCache for c in parts):
                n = tokens.shape[1]
                self._rows = [(c.keys[..., :n, :], c.values[..., :n, :]) for c in parts]
                mx.eval(self._rows)
        mx.eval([c.state for c in caches])


def _reads_as_made(cache: Any) -> bool:
    """Whether the tokens of one piece see each other as the model made them."""
    if type(cache) is TurboKVCache:
        return cache.protection.recent > 0
    return type(cache) is KVCache
