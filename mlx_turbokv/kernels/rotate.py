"""Rotates heads in mx ops: queries on their way to packed rows, and rows and outputs back."""

from __future__ import annotations

from functools import cache
from math import sqrt

import mlx.core as mx
import numpy as np

from ..quant import quantize
from ..quant.rotation import base_order, rotation_matrix, rotation_width, signs


@cache
def _signs(width: int) -> mx.array:
    array = mx.array(signs(width))
    mx.eval(array)
    return array


def rotate(x: mx.array, head_dim: int, inverse: bool = False) -> mx.array:
    """Rotate heads in float32, by MLX's Hadamard transform where the width is a power of two."""
    width = rotation_width(head_dim)
    if base_order(width) != 1:
        return quantize.rotate(x, head_dim, inverse)
    groups = x.astype(mx.float32)
    if width < head_dim:
        groups = groups.reshape(*x.shape[:-1], -1, width)
    if not inverse:
        groups = groups * _signs(width)
    groups = mx.hadamard_transform(groups, scale=1 / sqrt(width))
    if inverse:
        groups = groups * _signs(width)
    return groups.reshape(x.shape) if width < head_dim else groups


@cache
def _half_matrix(width: int, inverse: bool) -> mx.array:
    matrix = rotation_matrix(width)
    array = mx.array((matrix if inverse else matrix.T).astype(np.float16))
    mx.eval(array)
    return array


def rotate_to(x: mx.array, head_dim: int, dtype: mx.Dtype, inverse: bool = False) -> mx.array:
    """Rotate heads on the way to MLX's attention or from it, half rows in one product.

    Sums are float32. All entries of the matrix are +c or -c, and in half c is 1e-4 too small where
    it is no power of two: a fifth of what rounding the result may change.

    Shapes:
        x: [B, H, L, head_dim]; returns the same in ``dtype``.
    """
    if dtype != mx.float16:
        return rotate(x, head_dim, inverse).astype(dtype)
    width = rotation_width(head_dim)
    groups = x.astype(dtype)
    if width < head_dim:
        groups = groups.reshape(*x.shape[:-1], -1, width)
    return (groups @ _half_matrix(width, inverse)).reshape(x.shape)
