"""llama.cpp's quantised cache as a configuration to compare with: simulated by its published rule.

Since ggml-org/llama.cpp#21038 keys, queries and values of a quantised cache are rotated by a
Hadamard matrix before they are stored: keys by the largest power of two, at least 64, that divides
head_dim, values by 64. Rows are then quantised in ggml's blocks of 32. Here the rows are rotated
back as they are read: the same scores and outputs, in another order of sums.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from ..errors import InputError
from ..model.caches import own_caches, put_cache
from ..model.kv_layers import kv_layers

SIMULATED = "llama.cpp, simulated"
BLOCK = 32
LEAST_WIDTH = 64


class GgmlFormat(NamedTuple):
    """A format of ggml: codes of blocks of 32 values, with a scale (and a minimum) of 16 bits."""

    name: str
    bits: float

    def bits_per_value(self, head_dim: int) -> float:
        """Bits that one value takes, its share of the scales included."""
        return self.bits

    def __str__(self) -> str:
        return self.name


FORMATS = {"q4_0": GgmlFormat("q4_0", 4.5), "q5_1": GgmlFormat("q5_1", 6.0)}


def stored(x: mx.array, name: str) -> mx.array:
    """What a format keeps of values, in float32.

    Shapes:
        x: [..., n], n a multiple of 32; returns the same.
    """
    blocks = x.astype(mx.float32).reshape(*x.shape[:-1], -1, BLOCK)
    round_trip = _q4_0 if name == "q4_0" else _q5_1
    return round_trip(blocks).reshape(x.shape)


def _q4_0(x: mx.array) -> mx.array:
    """The value farthest from zero becomes code 0 of 16, which stands for -8 scales."""
    farthest = mx.take_along_axis(x, mx.argmax(mx.abs(x), axis=-1, keepdims=True), axis=-1)
    scale = farthest / -8
    codes = mx.minimum(mx.floor(x * _inverse(scale) + 8.5), 15)
    return (codes - 8) * _half(scale)


def _q5_1(x: mx.array) -> mx.array:
    """32 codes from the least value to the largest."""
    least = mx.min(x, axis=-1, keepdims=True)
    scale = (mx.max(x, axis=-1, keepdims=True) - least) / 31
    codes = mx.minimum(mx.floor((x - least) * _inverse(scale) + 0.5), 31)
    return codes * _half(scale) + _half(least)


def _inverse(scale: mx.array) -> mx.array:
    return mx.where(scale == 0, 0.0, 1 / mx.where(scale == 0, 1.0, scale))


def _half(x: mx.array) -> mx.array:
    """As the 16 bits that are stored."""
    return x.astype(mx.float16).astype(mx.float32)


def width_of_keys(head_dim: int) -> int:
    """The width of the keys' rotation: the largest power of two, from 64 on, in ``head_dim``."""
    return head_dim & -head_dim


def hadamard(x: mx.array, width: int) -> mx.array:
    """Rotate groups of ``width`` values by the Hadamard matrix, which is its own inverse.

    Shapes:
        x: [..., n], n a multiple of ``width``; returns the same, in float32.
    """
    groups = x.astype(mx.float32).reshape(*x.shape[:-1], -1, width)
    return mx.hadamard_transform(groups, scale=1 / sqrt(width)).reshape(x.shape)


class RotatedCache(KVCache):
    """mlx-lm's cache, with rows as llama.cpp's would read them back.

    Args:
        name: of the format of K and V.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.format = FORMATS[name]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Quantise new rows and return all rows.

        Shapes: keys, values and both results [B, n_kv_heads, L, head_dim].
        """
        rows = [
            hadamard(stored(hadamard(x, width), self.format.name), width).astype(x.dtype)
            for x, width in ((keys, width_of_keys(keys.shape[-1])), (values, LEAST_WIDTH))
        ]
        found: Any = super().update_and_fetch(*rows)
        return found

    @property
    def nbytes(self) -> int:
        """What the rows would take in the format."""
        held = [x for x in (self.keys, self.values) if x is not None]
        n_values = sum(x.size // x.shape[2] for x in held) * self.offset
        return int(n_values * self.format.bits / 8)


def check_head_dim(name: str, head_dim: int) -> None:
    """Raises: InputError where llama.cpp would not rotate heads of this size."""
    if head_dim % LEAST_WIDTH:
        raise InputError(
            f"Configuration {name!r} does not fit head_dim {head_dim}: llama.cpp rotates heads of "
            f"a multiple of {LEAST_WIDTH}."
        )


def make_rotated_caches(model: nn.Module, name: str) -> list[Any]:
    """The model's caches with a simulated one in every KV layer."""
    caches = own_caches(model)
    for layer in kv_layers(model, caches).layers:
        put_cache(caches, layer.index, layer.sub, RotatedCache(name))
    return caches
