"""Rotations: orthogonal, true Hadamard, and defined for the head_dims models use."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turbokv import InputError, KVFormat
from mlx_turbokv.quant.formats import check_head_dim
from mlx_turbokv.quant.rotate import rotate
from mlx_turbokv.quant.rotation import hadamard, rotation_matrix, rotation_width, signs

HEAD_DIMS = (64, 72, 80, 96, 112, 128, 160, 192, 256, 512)
ORTHOGONALITY = 5e-7


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_orthogonal_and_spreads(head_dim):
    width = rotation_width(head_dim)
    matrix = rotation_matrix(width).astype(np.float64)
    assert np.abs(matrix @ matrix.T - np.eye(width)).max() < ORTHOGONALITY
    assert np.allclose(np.abs(matrix), 1 / np.sqrt(width), rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 64, 128, 12, 20, 28, 36, 72, 80, 96, 112])
def test_hadamard_matrix_is_one(order):
    matrix = hadamard(order).astype(int)
    assert set(np.unique(matrix)) <= {-1, 1}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=int))


@pytest.mark.parametrize("order", [2, 16, 64, 128])
def test_power_of_two_equals_mlx_hadamard_transform(order):
    x = np.random.default_rng(0).standard_normal((3, order)).astype(np.float32)
    expected = np.array(mx.hadamard_transform(mx.array(x), scale=1.0))
    assert np.allclose(x @ hadamard(order).T, expected, atol=1e-4)


def test_wide_heads_split_into_the_fewest_groups():
    widths = {d: rotation_width(d) for d in HEAD_DIMS}
    assert widths == {
        64: 64, 72: 72, 80: 80, 96: 96, 112: 112, 128: 128, 160: 80, 192: 96, 256: 128, 512: 128
    }  # fmt: skip


@given(st.integers(min_value=1, max_value=1024))
def test_every_head_dim_is_rotated_or_named(head_dim):
    try:
        width = rotation_width(head_dim)
    except InputError as error:
        assert f"head_dim {head_dim} " in str(error)
        return
    assert head_dim % width == 0 and width <= 128
    assert len(hadamard(width)) == width


def test_signs_are_the_documented_bits():
    digest = hashlib.sha256(b"mlx_turbokv rotation signs").digest()
    expected = [-1 if digest[i // 8] >> (i % 8) & 1 else 1 for i in range(128)]
    assert signs(128).tolist() == expected and signs(64).tolist() == expected[:64]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotate_inverts_and_keeps_inner_products(head_dim):
    rng = np.random.default_rng(1)
    x, y = (mx.array(rng.standard_normal((2, 5, head_dim)).astype(np.float32)) for _ in "xy")
    back = rotate(rotate(x, head_dim), head_dim, inverse=True)
    assert mx.abs(back - x).max().item() < 1e-5
    product = (rotate(x, head_dim) * rotate(y, head_dim)).sum(-1)
    assert mx.abs(product - (x * y).sum(-1)).max().item() < 1e-4


@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("inverse", [False, True])
def test_half_rows_are_rotated_to_half_precision(head_dim: int, inverse: bool) -> None:
    x = np.random.default_rng(head_dim).standard_normal((1, 2, 40, head_dim)).astype(np.float16)
    width = rotation_width(head_dim)
    matrix = rotation_matrix(width).astype(np.float64)
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, width)
    expected = (groups @ (matrix if inverse else matrix.T)).reshape(x.shape)
    got = rotate(mx.array(x), head_dim, inverse, mx.float16)
    assert got.dtype == mx.float16
    assert np.abs(np.array(got) - expected).max() <= 2**-10 * np.abs(expected).max()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("inverse", [False, True])
def test_values_of_one_magnitude_cancel_exactly(head_dim: int, inverse: bool) -> None:
    """Kernels bound huge values, which then have one magnitude: sums that are 0 must be 0."""
    width = rotation_width(head_dim)
    x = np.sign(np.random.default_rng(head_dim).standard_normal((40, head_dim)))
    signed = np.sign(rotation_matrix(width)).astype(np.float64)
    sums = x.reshape(40, -1, width) @ (signed if inverse else signed.T)
    expected = (sums.astype(np.float32) * np.float32(2**50 / np.sqrt(width))).reshape(x.shape)
    got = np.array(rotate(mx.array((2.0**50 * x).astype(np.float32)), head_dim, inverse))
    assert ((got == 0) == (expected == 0)).all() and (expected == 0).any()
    assert np.abs(got - expected).max() <= 2**-22 * np.abs(expected).max()


@pytest.mark.parametrize("head_dim", [(1 << 16) + 8, (1 << 40) + 8, 1 << 62])
def test_a_huge_head_dim_is_refused_at_once(head_dim):
    """Sizes may come from a file: every split of the head would be tried."""
    with pytest.raises(InputError, match="cannot be rotated"):
        rotation_width(head_dim)
    with pytest.raises(InputError, match="cannot be packed"):
        check_head_dim(KVFormat.parse("q8_0"), head_dim)
