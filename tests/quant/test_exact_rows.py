"""Rows on the grid are rotated without rounding, in any order of the sums."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from exact_rows import exact_rows

from mlx_turbokv.quant.rotate import rotate
from mlx_turbokv.quant.rotation import rotation_matrix


@pytest.mark.parametrize("width", [16, 64])
def test_rotated_rows_are_those_of_float64(width: int) -> None:
    rows = exact_rows(np.random.default_rng(0), 500, width) * 100
    expected = np.array(rows, np.float64) @ rotation_matrix(width).astype(np.float64).T
    for n in (1, 3, 500):
        assert np.array_equal(np.array(rotate(rows[:n], width)), expected[:n])
    other_order = mx.array(np.random.default_rng(1).permutation(width))
    matrix = mx.array(rotation_matrix(width))[:, other_order]
    assert np.array_equal(np.array(rows[:, other_order] @ matrix.T), expected)
