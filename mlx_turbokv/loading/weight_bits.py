"""Bits that a model's weights take, by what its configuration says of their quantisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

UNQUANTISED = 16.0  # bits
# Bits of a group's scale (and bias), by MLX's mode of quantisation.
_GROUP_BITS = {"affine": 32, "mxfp4": 8, "nvfp4": 8, "mxfp8": 8}
_MXFP4 = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
_GROUPS = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}


def weight_bytes(sizes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> int:
    """Bytes of a model's parameters.

    Args:
        sizes: their shapes by name.
        config: the model's; its ``quantization`` may differ by layer, and name ``experts`` apart.
    """
    quantization, total = _quantization(config), 0.0
    for name, shape in sizes.items():
        is_matrix = name.endswith("weight") and len(shape) > 1
        total += math.prod(shape) * (_bits_of(name, quantization) if is_matrix else UNQUANTISED) / 8
    return round(total)


def bits_text(n_bytes: int, n_parameters: int) -> str:
    """Bits a weight on average, as a sentence has them."""
    return f"{8 * n_bytes / n_parameters:.2f}".rstrip("0").rstrip(".")


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """MLX's entry, or the one of a model that comes with experts in MXFP4."""
    if isinstance(found := config.get("quantization"), dict):
        return found
    original = config.get("quantization_config")
    if isinstance(original, dict) and original.get("quant_method") == "mxfp4":
        return {"experts": _MXFP4}
    return {}


def _bits_of(name: str, quantization: dict[str, Any]) -> float:
    path = name.removesuffix(".weight")
    own = quantization.get(path)
    if own is None and "experts" in path:
        own = quantization.get("experts")
    if own is None or own is True:
        own = quantization
    if not isinstance(own, dict) or not own.get("bits"):
        return UNQUANTISED
    mode = own.get("mode") or "affine"
    group = own.get("group_size") or _GROUPS.get(mode, 64)
    return own["bits"] + _GROUP_BITS.get(mode, 32) / group
