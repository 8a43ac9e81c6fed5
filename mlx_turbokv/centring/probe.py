"""How a model's keys turn with the position, read off one call with one token.

The model is called through caches that claim some offset and note what they are handed, while
``mx.fast.rope``, through which mlx-lm's models turn keys, notes its arguments and results. A layer
whose keys are the very array that RoPE gave for the cache's own offset is understood: whatever its
variant, its angles are those arguments. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from ..model.kv_layers import KVLayer
from ..model.shapes import own_caches, put_cache
from .centre import Turning

OFFSET = 37  # any number that no model would use by chance


class NotingCache(KVCache):
    """Claims to hold ``OFFSET`` tokens, and keeps the newest keys for whoever asks."""

    def __init__(self, offset: int = OFFSET) -> None:
        super().__init__()
        self.offset = offset
        self.handed: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.handed = keys
        return keys, values


class RopeCalls:
    """The calls of ``mx.fast.rope``: result and arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[mx.array, dict[str, Any]]] = []

    def turning_of(self, keys: mx.array, offset: int) -> Turning | None:
        """How ``keys`` were turned, if they are a result of RoPE at ``offset``."""
        for result, arguments in self.calls:
            if (
                result is keys
                and type(arguments["offset"]) is int
                and arguments["offset"] == offset
            ):
                freqs = arguments["freqs"]
                return Turning.of_rope(
                    keys.shape[-1],
                    arguments["dims"],
                    arguments["traditional"],
                    arguments["base"],
                    arguments["scale"],
                    None if freqs is None else np.array(freqs),
                )
        return None


@contextmanager
def noted_rope() -> Iterator[RopeCalls]:
    """Notes what ``mx.fast.rope`` is asked for."""
    noted, rope = RopeCalls(), mx.fast.rope

    def note(a, dims, *, traditional, base, scale, offset, freqs=None, **options):
        result = rope(
            a, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs,
            **options,
        )  # fmt: skip
        arguments = {"dims": dims, "traditional": traditional, "base": base, "scale": scale}
        noted.calls.append((result, {**arguments, "offset": offset, "freqs": freqs}))
        return result

    mx.fast.rope = note
    try:
        yield noted
    finally:
        mx.fast.rope = rope


def find_turnings(model: nn.Module, layers: list[KVLayer]) -> dict[int, Turning]:
    """How the keys of KV layers turn, by ordinal; layers that are not understood are missing.

    Args:
        model: a model of mlx-lm, called with one token; nothing is computed.
    """
    noting = {layer.ordinal: NotingCache() for layer in layers}
    caches = own_caches(model)
    for layer in layers:
        put_cache(caches, layer.index, layer.sub, noting[layer.ordinal])
    with noted_rope() as calls:
        try:
            model(mx.zeros((1, 1), mx.int32), cache=caches)
        except Exception:  # what a model needs beyond tokens is known to its own loader alone
            return {}
    found = {}
    for ordinal, cache in noting.items():
        if cache.handed is not None:
            turning = calls.turning_of(cache.handed, OFFSET)
            if turning is not None:
                found[ordinal] = turning
    return found
