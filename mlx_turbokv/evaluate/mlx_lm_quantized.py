"""mlx-lm's own quantised cache as a configuration to compare with, on any device.

On an NVIDIA GPU MLX has no quantised matmul for every shape that attention meets, and compiles
those that it has for minutes. There the rows that mlx-lm's cache stores are dequantised, by MLX,
before attention: the same numbers enter the same products, added in another order.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, _BaseCache

from ..model.caches import own_caches, put_cache
from ..model.kv_layers import kv_layers

MLX_LM, DEQUANTIZED = "mlx-lm", "mlx-lm, rows dequantised"


class DequantizedCache(_BaseCache):
    """Rows of mlx-lm's QuantizedKVCache, given to the model dequantised.

    It has no attribute ``bits``: by that mlx-lm chooses its quantised attention.
    """

    def __init__(self, bits: int, group_size: int):
        self._packed: Any = QuantizedKVCache(group_size=group_size, bits=bits)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Quantise new rows and return all rows, dequantised.

        Shapes: keys, values and both results [B, n_kv_heads, L, head_dim].
        """
        packed = self._packed
        how = {"group_size": packed.group_size, "bits": packed.bits}
        k, v = packed.update_and_fetch(keys, values)
        return mx.dequantize(*k, **how), mx.dequantize(*v, **how)

    @property
    def offset(self) -> int:
        return self._packed.offset

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._packed.keys, self._packed.values

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes

    def empty(self) -> bool:
        return self._packed.empty()

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        return self._packed.make_mask(*args, **kwargs)


def needs_dequantizing() -> bool:
    """Whether the device lacks quantised matmuls for attention."""
    gpu = mx.default_device().type == mx.DeviceType.gpu
    return gpu and not mx.metal.is_available()


def make_quantized_caches(
    model: nn.Module, bits: int, group: int, dequantized: bool = False
) -> list[Any]:
    """The model's caches with mlx-lm's quantised cache in every KV layer.

    Args:
        dequantized: give the model dequantised rows.
    """
    caches = own_caches(model)
    make = DequantizedCache if dequantized else QuantizedKVCache
    for layer in kv_layers(model, caches).layers:
        put_cache(caches, layer.index, layer.sub, make(bits=bits, group_size=group))
    return caches
