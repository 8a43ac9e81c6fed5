"""Quantised rows against NumPy in float64, published errors, and hostile values."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlx_turbokv import KVFormat
from mlx_turbokv.quant import quantize
from mlx_turbokv.quant.codebook import codebook
from mlx_turbokv.quant.rotation import rotation_matrix, rotation_width

NAMES = ("q8_0", "turbo2", "turbo3", "turbo4", "turbo5", "turbo6", "turbo3:32", "turbo8")
# relative MSE of unit vectors, d = 128, after the rotation, with least-squares scales
PUBLISHED_MSE = {2: 0.1152, 3: 0.0335, 4: 0.00916}
Q8_MSE = 2.9e-5
MSE_TOLERANCE = 0.02
BOUNDARY = 1e-5  # a value this near a decision boundary may take either code


def round_trip(x: np.ndarray, name: str) -> np.ndarray:
    fmt = KVFormat.parse(name)
    units, scales = quantize.quantize(mx.array(x), fmt)
    return np.array(quantize.values(units, scales, fmt, x.shape[-1], mx.float32))


def rotated(x: np.ndarray) -> np.ndarray:
    width = rotation_width(x.shape[-1])
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, width)
    return (groups @ rotation_matrix(width).astype(np.float64).T).reshape(x.shape)


@pytest.mark.parametrize("bits", PUBLISHED_MSE)
def test_turbo_error_is_the_published_one(bits):
    x = np.random.default_rng(bits).standard_normal((6000, 128)).astype(np.float32)
    error = np.square(round_trip(x, f"turbo{bits}") - rotated(x)).sum() / np.square(x).sum()
    # an unbiased scale is 1 / (1 - e) times the least-squares scale of relative error e
    expected = PUBLISHED_MSE[bits] / (1 - PUBLISHED_MSE[bits])
    assert abs(error / expected - 1) < MSE_TOLERANCE


@pytest.mark.parametrize("name", ["q8_0", "turbo8"])
def test_error_of_8_bits_is_the_published_one(name):
    x = np.random.default_rng(0).standard_normal((6000, 128)).astype(np.float32)
    expected = rotated(x) if name == "turbo8" else x
    error = np.square(round_trip(x, name) - expected).sum() / np.square(x).sum()
    assert abs(error / Q8_MSE - 1) < MSE_TOLERANCE


@pytest.mark.parametrize("head_dim", [64, 72, 80, 256])
def test_turbo8_is_q8_0_of_rotated_rows(head_dim):
    x = np.random.default_rng(6).standard_normal((40, head_dim)).astype(np.float32)
    y = rotated(x)
    result = round_trip(x, "turbo8")
    for start in range(0, head_dim, 32):
        group, got = y[:, start : start + 32], result[:, start : start + 32]
        step = np.abs(group).max(-1, keepdims=True) / 127
        assert (np.abs(got - group) <= 0.5 * step * (1 + 2**-4) + 1e-9).all()
        codes = got / (step.astype(np.float16).astype(np.float64))
        assert np.abs(codes - np.round(codes)).max() < 127 * 2**-10


@pytest.mark.parametrize("head_dim", [64, 72, 80, 256])
@pytest.mark.parametrize("name", ["turbo2", "turbo4", "turbo5:32"])
def test_turbo_codes_are_the_nearest_and_scales_unbiased(name, head_dim):
    fmt = KVFormat.parse(name)
    width = fmt.group_width(head_dim)
    x = np.random.default_rng(5).standard_normal((40, head_dim)).astype(np.float32)
    result = round_trip(x, name)
    table = codebook(fmt.bits, width).astype(np.float64)
    y = rotated(x)
    for start in range(0, head_dim, width):
        group, got = y[:, start : start + width], result[:, start : start + width]
        raw = np.sqrt(np.square(group).mean(-1, keepdims=True))
        nearest = np.abs((group / raw)[..., None] - table).argmin(-1)
        c = table[nearest]
        scale = np.square(group).sum(-1) / (group * c).sum(-1)
        assert np.abs(got - scale[:, None] * c).max() < 2e-3 * np.abs(y).max()


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 64), elements=st.floats(-6e4, 6e4, width=32, allow_subnormal=False)),
    st.sampled_from(NAMES),
)
def test_error_is_bounded_and_zero_stays_zero(x, name):
    x[0] = 0
    fmt = KVFormat.parse(name)
    expected = rotated(x) if fmt.is_turbo else x.astype(np.float64)
    result = round_trip(x, name)
    assert np.isfinite(result).all()
    assert not result[0].any()
    norm = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(result - expected, axis=-1)
    assert (error <= (1 if fmt.bits == 2 else 0.9) * norm + 1e-4).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_stay_in_their_row(name, bad):
    x = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
    clean = round_trip(x, name)
    x[1, 17] = bad
    result = round_trip(x, name)
    assert np.isnan(result[1]).any()
    assert np.array_equal(np.delete(result, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e9, 1e25, 3e38])
def test_scales_beyond_fp16_saturate(name, size):
    x = size * np.random.default_rng(0).uniform(-1, 1, (8, 64)).astype(np.float32)
    x[0] = size
    assert np.isfinite(round_trip(x, name)).all()


@pytest.mark.parametrize("name", ["q8_0", "turbo4"])
def test_the_largest_half_is_read_back_finite_in_half(name):
    x = np.zeros((2, 64), np.float16)
    x[0, 3], x[1] = 65504, np.random.default_rng(0).uniform(-65504, 65504, 64)
    result = round_trip(x, name)
    if name == "q8_0":
        assert np.isfinite(result.astype(np.float16)).all()
        assert np.abs(result - x).max() <= 65504 / 127 / 2
    assert np.isfinite(result).all()


SMALLEST_STEP = 2.0**-24  # the smallest half; half of it is the largest magnitude that is lost


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 64), elements=st.floats(-1, 1, width=32)),
    st.floats(-46, 14),
    st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
)
def test_q8_0_is_off_by_half_a_step_at_any_size(x, exponent, dtype):
    """The step is the largest magnitude of a group over 127, or the smallest half."""
    x[:, 0], x[:, 32] = 1, 0.3
    rows = mx.array(x * np.float32(2.0**exponent)).astype(dtype)
    fmt = KVFormat.parse("q8_0")
    units, scales = quantize.quantize(rows, fmt)
    x = np.array(rows.astype(mx.float32)).astype(np.float64)
    result = np.array(quantize.values(units, scales, fmt, 64, mx.float32))
    largest = np.abs(x.reshape(3, 2, 32)).max(-1)
    step = np.array(scales).astype(np.float64)
    lost = largest <= SMALLEST_STEP / 2
    assert not step[lost].any() and step[~lost].all()
    assert (step[~lost] <= largest[~lost] / 127 * (1 + 2**-11) + SMALLEST_STEP).all()
    error = np.abs(result - x).reshape(3, 2, 32).max(-1)
    half_step = np.where(lost, SMALLEST_STEP, step) / 2
    assert (error <= half_step * (1 + 2**-5)).all()  # 127 steps of a half may be 1/16 step short
    assert (error <= half_step * (1 + 1e-6))[step < 2**-14].all()


@pytest.mark.parametrize("size", [1e-5, 1e-6, 1e-7, 5e-8])
@pytest.mark.parametrize("name", NAMES)
def test_small_rows_are_kept(name, size):
    """Off by what the format is off at size 1, and by half a unit of the scale, a half."""
    x = np.random.default_rng(3).standard_normal((50, 64)).astype(np.float32)
    x /= np.sqrt(np.square(x).mean(-1, keepdims=True))
    usual = np.sqrt(np.square(round_trip(x, name) - (x if name == "q8_0" else rotated(x))).mean(-1))
    small = (size * x).astype(np.float32)
    expected = small if name == "q8_0" else rotated(small)
    error = np.sqrt(np.square(round_trip(small, name) - expected).mean(-1))
    step = SMALLEST_STEP / 2 if name != "q8_0" else SMALLEST_STEP / np.sqrt(12) * 1.5
    assert (error <= 1.2 * usual * size + 1.2 * step).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_what_is_below_half_a_step_becomes_zero(name):
    for size in (0, 1e-45, 1e-30, 2.0**-28):
        x = np.full((1, 64), size, np.float32)
        x[:, ::2] *= -1
        assert not round_trip(x, name).any()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_f16_rows_are_the_models_own_bits(dtype):
    x = mx.random.normal((5, 64)).astype(dtype)
    fmt = KVFormat.parse("f16")
    units, scales = quantize.quantize(x, fmt)
    assert scales.size == 0
    assert mx.array_equal(quantize.values(units, scales, fmt, 64, dtype), x.astype(mx.float32))
