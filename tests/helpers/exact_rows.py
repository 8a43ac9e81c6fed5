"""Rows that are rotated without rounding, so that packing them gives the same bits on any machine.

A BLAS adds in another order for another number of rows, and each kind of CPU in its own. Where a
rotated value lies next to a decision boundary, or a scale between two half-precision numbers, such
rounding turns a code: of random rows about one in 100,000. Tests that say "the same rows, however
they were cut" would then test their luck. Multiples of 1/64 have exact sums in float32, and a
rotation of width 16 or 64 scales them by a power of two.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

STEPS = 64  # in 1; sums of 64 values up to 2**11 are exact


def on_a_grid(x: mx.array) -> mx.array:
    """The nearest rows that are rotated exactly where head_dim is 16 or 64, in float32.

    Shapes:
        x, returns: [..., head_dim].
    """
    return mx.round(x.astype(mx.float32) * STEPS) / STEPS


def exact_rows(rng: np.random.Generator, *shape: int) -> mx.array:
    """Normal rows on that grid, [..., head_dim]."""
    return on_a_grid(mx.array(rng.standard_normal(shape).astype(np.float32)))
