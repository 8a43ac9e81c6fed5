"""Codebooks against published tables and against the conditions that define them."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_turbokv.quant.codebook import boundaries, codebook

# positive halves for unit vectors, as published for TurboQuant+; its 4-bit tables stopped
# iterating at about 1e-5, ours stand still
PUBLISHED = {
    (2, 128): [0.039992, 0.133042],
    (3, 128): [0.021606, 0.066589, 0.118144, 0.188401],
    (4, 128): [0.011304, 0.034157, 0.057780, 0.082838, 0.110300, 0.141817, 0.180847, 0.237673],
    (2, 64): [0.056515, 0.187497],
    (3, 64): [0.030470, 0.093834, 0.166170, 0.263916],
    (4, 64): [0.015921, 0.048096, 0.081321, 0.116497, 0.154937, 0.198868, 0.252925, 0.330806],
    (2, 256): [0.028289, 0.094239],
    (3, 256): [0.015299, 0.047169, 0.083769, 0.133857],
    (4, 256): [0.008010, 0.024206, 0.040958, 0.058742, 0.078260, 0.100709, 0.128598, 0.169419],
}
GAUSSIAN = {
    2: [0.452780, 1.510418],
    3: [0.245094, 0.756005, 1.343909, 2.151946],
    4: [0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590],
}
PUBLISHED_TOLERANCE = 1.5e-5  # absolute, unit vectors
STATIONARITY = 2e-6  # a level and the mean of its cell, unit variance


@pytest.mark.parametrize(("bits", "width"), PUBLISHED)
def test_codebook_equals_published(bits, width):
    upper = codebook(bits, width)[2 ** (bits - 1) :] / np.sqrt(width)
    assert np.abs(upper - PUBLISHED[bits, width]).max() < PUBLISHED_TOLERANCE


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_codebook_approaches_gaussian_in_many_dimensions(bits):
    upper = codebook(bits, 4096)[2 ** (bits - 1) :]
    assert np.abs(upper - GAUSSIAN[bits]).max() < 2e-3  # the deviation is O(1 / 4096)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("width", [8, 32, 64, 72, 80, 96, 112, 128])
def test_codebook_is_stationary(bits, width):
    """Every level is the mean of its cell: Gauss-Legendre quadrature of the density."""
    table = codebook(bits, width).astype(np.float64)
    assert np.array_equal(table, -table[::-1])
    edges = np.concatenate([[-np.sqrt(width)], (table[1:] + table[:-1]) / 2, [np.sqrt(width)]])
    nodes, weights = np.polynomial.legendre.leggauss(200)
    for level, low, high in zip(table, edges[:-1], edges[1:]):
        x = (high - low) / 2 * nodes + (high + low) / 2
        density = weights * np.clip(1 - x**2 / width, 0, None) ** ((width - 3) / 2)
        assert abs((x * density).sum() / density.sum() - level) < STATIONARITY * max(1, abs(level))


def test_boundaries_are_midpoints_and_tables_are_read_only():
    table, middle = codebook(4, 128), boundaries(4, 128)
    assert np.allclose(middle, (table[1:] + table[:-1]) / 2, atol=1e-7)
    with pytest.raises(ValueError):
        table[0] = 0
