"""Rotates heads: rows before they are quantised, queries that meet them, and results back."""

from __future__ import annotations

from functools import cache
from math import sqrt

import mlx.core as mx
import numpy as np

from .rotation import base_order, rotation_matrix, rotation_width, signs


def rotate(
    x: mx.array, head_dim: int, inverse: bool = False, dtype: mx.Dtype = mx.float32
) -> mx.array:
    """Rotate each group of ``rotation_width(head_dim)`` values of ``x``, or undo it.

    float16 is one product in half with float32 sums: all entries of the matrix are +c or -c, and
    c in half is 1e-4 too small where it is no power of two, a fifth of the result's own rounding.
    Other types are rotated in float32: on a GPU by MLX's Hadamard transform where the width is a
    power of two, else by a matrix product. The division by sqrt(width) comes last, as in the
    kernels: sums of values of one magnitude are then exact, zeros among them.

    Shapes:
        x: [..., head_dim]; returns the same in ``dtype``.
    """
    width = rotation_width(head_dim)
    if dtype == mx.float16:
        groups = x.astype(dtype).reshape(*x.shape[:-1], -1, width)
        return (groups @ _matrix(width, inverse, dtype)).reshape(x.shape)
    groups = x.astype(mx.float32).reshape(*x.shape[:-1], -1, width)
    if base_order(width) == 1 and mx.default_device() == mx.gpu:
        groups = groups if inverse else groups * _signs(width)
        groups = mx.hadamard_transform(groups, scale=1.0)
        groups = groups * _signs(width) if inverse else groups
    else:
        groups = groups @ _matrix(width, inverse, mx.float32)
    return (groups * (1 / sqrt(width))).reshape(x.shape).astype(dtype)


@cache
def _signs(width: int) -> mx.array:
    array = mx.array(signs(width))
    mx.eval(array)  # evaluated arrays may be used from any thread
    return array


@cache
def _matrix(width: int, inverse: bool, dtype: mx.Dtype) -> mx.array:
    """What rows are multiplied by: the rotation's transpose, or the rotation for its inverse.

    For float32 rows it is sqrt(width) times that, whose entries are +1 and -1.
    """
    matrix = rotation_matrix(width)
    matrix = matrix if inverse else matrix.T
    array = mx.array(matrix.astype(np.float16) if dtype == mx.float16 else np.sign(matrix))
    mx.eval(array)
    return array
