"""Packing and attention in float64 NumPy, to check the reference ops against."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..quant.codebook import boundaries, codebook
from ..quant.formats import KVFormat
from ..quant.rotation import rotation_matrix, rotation_width
from ..quant.tiles import UNITS


def codes_from_units(units: mx.array, bits: int) -> np.ndarray:
    """Single codes, in the order of the dims; q8_0's are signed.

    Shapes:
        units: [..., units in a row]; returns: [..., head_dim] int64.
    """
    found = np.array(units).astype(np.int64)
    _, per_unit = UNITS[bits]
    codes = (found[..., None] >> (bits * np.arange(per_unit))) & ((1 << bits) - 1)
    codes = codes.reshape(*found.shape[:-1], -1)
    return np.where(codes > 127, codes - 256, codes) if bits == 8 else codes


def quantized(x: np.ndarray, fmt: KVFormat) -> tuple[np.ndarray, np.ndarray]:
    """Codes and fp16 scales of rows.

    Shapes:
        x: [..., head_dim] float64; returns: codes [..., head_dim], scales [..., groups].
    """
    dim = x.shape[-1]
    width = fmt.group_width(dim)
    rows = _rotated(x) if fmt.is_turbo else x
    codes, scales = [], []
    for first in range(0, dim, width):
        group = rows[..., first : first + width]
        if fmt.is_turbo:
            code, scale = _turbo(group, fmt.bits, width)
        else:
            scale = (np.abs(group).max(axis=-1) / 127).astype(np.float16)
            step = scale.astype(np.float64)[..., None]
            code = np.round(group / np.where(step > 0, step, np.inf)).clip(-127, 127)
        codes.append(code.astype(np.int64))
        scales.append(scale)
    return np.concatenate(codes, axis=-1), np.stack(scales, axis=-1)


def dequantized(codes: np.ndarray, scales: np.ndarray, fmt: KVFormat) -> np.ndarray:
    """Rows in the original basis, float64.

    Shapes:
        codes: [..., head_dim]; scales: [..., groups]; returns: [..., head_dim].
    """
    dim = codes.shape[-1]
    width = fmt.group_width(dim)
    levels = codebook(fmt.bits, width).astype(np.float64)[codes] if fmt.is_turbo else codes
    rows = levels * np.repeat(scales.astype(np.float64), width, axis=-1)[..., :dim]
    return _rotated(rows, inverse=True) if fmt.is_turbo else rows


def attention(q, k, v, scale: float, seen: np.ndarray, sinks=None) -> np.ndarray:
    """Softmax attention.

    Shapes:
        q: [B, n_heads, L, D]; k, v: [B, n_heads, n, D]; sinks: [n_heads].
        seen: bool, broadcast to [B, n_heads, L, n].
    """
    scores = np.where(seen, q @ k.swapaxes(-1, -2) * scale, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
        scores = np.concatenate([scores, sink], axis=-1)
    top = np.maximum(scores.max(axis=-1, keepdims=True), -1e30)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights[..., : k.shape[2]] @ v / np.where(total == 0, 1, total)


def _turbo(y: np.ndarray, bits: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    energy = np.square(y).sum(axis=-1)
    raw = np.sqrt(energy / y.shape[-1])
    normal = y / np.where(raw > 0, raw, np.inf)[..., None]
    codes = np.searchsorted(boundaries(bits, width).astype(np.float64), normal)
    levels = codebook(bits, width).astype(np.float64)[codes]
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = energy / (y * levels).sum(axis=-1)
    return codes, np.where(energy > 0, scale, 0).astype(np.float16)


def _rotated(x: np.ndarray, inverse: bool = False) -> np.ndarray:
    matrix = rotation_matrix(rotation_width(x.shape[-1])).astype(np.float64)
    groups = x.reshape(*x.shape[:-1], -1, len(matrix))
    return (groups @ (matrix if inverse else matrix.T)).reshape(x.shape)
