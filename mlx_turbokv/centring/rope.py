"""RoPE frequencies of a model's keys, read off one call with one token.

The model is called through caches that claim to hold some tokens and record the keys they are
given, while ``mx.fast.rope``, which mlx-lm's models apply to keys, records its arguments and
results. Where a layer's keys are the very array that RoPE returned for the cache's own offset, its
frequencies follow from those arguments, whatever the variant. Nothing is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.kv_layers import KVLayer
from ..model.probing import record_one_token

OFFSET = 37  # any number that no model would use by chance, and all have positions for
_lock = threading.RLock()


@dataclass(frozen=True)
class RopeFrequencies:
    """The angle by which RoPE rotates each pair of dims of a key per position.

    Pair i is dims (i, split_pairs + i) for i < split_pairs, and dims (2 i, 2 i + 1) from there on.

    Args:
        split_pairs: pairs whose dims lie apart; 0 where RoPE is traditional or there is none.
        angles: radians per position of each pair, float32 values; 0 for pairs without RoPE.
    """

    split_pairs: int
    angles: tuple[float, ...]

    @classmethod
    def from_arguments(
        cls,
        head_dim: int,
        dims: int,
        traditional: bool,
        base: float | None = None,
        scale: float = 1.0,
        freqs: np.ndarray | None = None,
    ) -> RopeFrequencies:
        """From the arguments of ``mx.fast.rope``."""
        angles = np.zeros(head_dim // 2)
        if freqs is not None:
            angles[: dims // 2] = scale / np.asarray(freqs, np.float64)
        elif base is not None:
            angles[: dims // 2] = scale * base ** (-np.arange(0, dims, 2) / dims)
        angles = angles.astype(np.float32)
        return cls(0 if traditional else dims // 2, tuple(float(a) for a in angles))

    @classmethod
    def none(cls, head_dim: int) -> RopeFrequencies:
        """Keys that do not depend on the position."""
        return cls(0, (0.0,) * (head_dim // 2))

    @property
    def head_dim(self) -> int:
        """Values of a key."""
        return 2 * len(self.angles)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The first and the second dim of each pair."""
        i = np.arange(self.head_dim // 2)
        split = i < self.split_pairs
        return np.where(split, i, 2 * i), np.where(split, self.split_pairs + i, 2 * i + 1)


class RopeCalls:
    """The calls of ``mx.fast.rope``: result and arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[mx.array, dict[str, Any]]] = []

    def frequencies_of(self, keys: mx.array, offset: int) -> RopeFrequencies | None:
        """RoPE's frequencies if ``keys`` is the result of a call at ``offset``."""
        for result, arguments in self.calls:
            if (
                result is keys
                and type(arguments["offset"]) is int
                and arguments["offset"] == offset
            ):
                freqs = arguments["freqs"]
                return RopeFrequencies.from_arguments(
                    keys.shape[-1],
                    arguments["dims"],
                    arguments["traditional"],
                    arguments["base"],
                    arguments["scale"],
                    None if freqs is None else np.array(freqs),
                )
        return None


@contextmanager
def recorded_rope() -> Iterator[RopeCalls]:
    """Record this thread's calls of ``mx.fast.rope``; one thread at a time replaces it."""
    with _lock:
        recorded, rope, thread = RopeCalls(), mx.fast.rope, threading.get_ident()

        def record(a, dims, *, traditional, base, scale, offset, freqs=None, **options):
            arguments = {"traditional": traditional, "base": base, "scale": scale, "offset": offset}
            result = rope(a, dims, **arguments, freqs=freqs, **options)
            if threading.get_ident() == thread:
                recorded.calls.append((result, {"dims": dims, **arguments, "freqs": freqs}))
            return result

        mx.fast.rope = record
        try:
            yield recorded
        finally:
            mx.fast.rope = rope


def find_rope_frequencies(model: nn.Module, layers: list[KVLayer]) -> dict[int, RopeFrequencies]:
    """The RoPE frequencies of KV layers, by ordinal; layers where none were found are missing.

    Args:
        model: a model of mlx-lm, called with one token; nothing is computed.
    """
    ordinals = {(layer.index, layer.sub): layer.ordinal for layer in layers}
    with recorded_rope() as calls:
        caches = record_one_token(model, ordinals, OFFSET)
    found = {}
    for position, cache in caches.items():
        if (rope := calls.frequencies_of(cache.keys, OFFSET)) is not None:
            found[ordinals[position]] = rope
    return found
