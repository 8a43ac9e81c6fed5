"""llama.cpp's rotated cache, simulated: against ggml's rounding written out in NumPy."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from scipy.linalg import hadamard as sylvester
from tiny_models import tiny_model

from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate import configuration
from mlx_turbokv.evaluate.llama_cpp import RotatedCache, hadamard, stored, width_of_keys
from mlx_turbokv.evaluate.names import check_name
from mlx_turbokv.evaluate.windows import scored_logits

F32 = np.float32


def ggml_block(x: np.ndarray, name: str) -> np.ndarray:
    """One block of 32 as quantize_row_NAME_ref rounds it and dequantize_row_NAME reads it."""
    out = np.zeros(32, F32)
    if name == "q4_0":
        most = F32(0)
        for value in x:
            if abs(value) > abs(most):
                most = value
        d = F32(most / F32(-8))
        inverse = F32(1) / d if d else F32(0)
        for i, value in enumerate(x):
            code = min(15, int(F32(value * inverse + F32(8.5))))
            out[i] = F32(code - 8) * F32(np.float16(d))
        return out
    low, high = x.min(), x.max()
    d = F32((high - low) / F32(31))
    inverse = F32(1) / d if d else F32(0)
    for i, value in enumerate(x):
        code = int(F32((value - low) * inverse + F32(0.5)))
        out[i] = F32(code) * F32(np.float16(d)) + F32(np.float16(low))
    return out


def rows(seed: int, *shape: int) -> np.ndarray:
    """Rows with a loud dim, a quiet one and a row of zeros."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(F32)
    x[..., 3] *= 40
    x[..., 9] *= 1e-3
    x[0, 0, 0] = 0
    return x


@pytest.mark.parametrize("name", ["q4_0", "q5_1"])
def test_blocks_are_rounded_as_ggml_rounds_them(name):
    x = rows(1, 2, 2, 40, 64)
    expected = np.stack([ggml_block(block, name) for block in x.reshape(-1, 32)]).reshape(x.shape)
    found = np.array(stored(mx.array(x), name))
    # a product that lies on the border of two codes may fall to either
    step = np.abs(x).reshape(-1, 32).max(axis=1).repeat(32).reshape(x.shape) / 7
    differs = np.abs(found - expected) > 1e-6 * np.abs(x).max()
    assert differs.mean() < 1e-3 and (np.abs(found - expected) <= 1.01 * step).all()
    assert (found[0, 0, 0] == 0).all()


@pytest.mark.parametrize(("head_dim", "width"), [(64, 64), (128, 128), (192, 64), (256, 256)])
def test_keys_are_rotated_by_the_largest_power_of_two_in_head_dim(head_dim, width):
    assert width_of_keys(head_dim) == width
    x = rows(2, 1, 1, 3, head_dim)
    matrix = sylvester(width) / np.sqrt(width)
    expected = (x.reshape(-1, width).astype(np.float64) @ matrix).reshape(x.shape)
    np.testing.assert_allclose(np.array(hadamard(mx.array(x), width)), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["q4_0", "q5_1"])
def test_the_cache_returns_rows_that_were_rotated_stored_and_rotated_back(name):
    keys, values = rows(3, 2, 2, 5, 128), rows(4, 2, 2, 5, 128)
    cache = RotatedCache(name)
    for at in (slice(0, 3), slice(3, 5)):
        found = cache.update_and_fetch(mx.array(keys[:, :, at]), mx.array(values[:, :, at]))
    for x, rows_found, width in ((keys, found[0], 128), (values, found[1], 64)):
        matrix = sylvester(width) / np.sqrt(width)
        rotated = (x.reshape(-1, width).astype(np.float64) @ matrix).astype(F32)
        kept = np.stack([ggml_block(block, name) for block in rotated.reshape(-1, 32)])
        expected = (kept.reshape(-1, width).astype(np.float64) @ matrix).reshape(x.shape)
        error = np.abs(np.array(rows_found) - expected)
        assert np.median(error) < 1e-5 and error.mean() < 1e-3 * np.abs(x).max()
    bits = {"q4_0": 4.5, "q5_1": 6.0}[name]
    assert cache.nbytes == 2 * 2 * 2 * 5 * 128 * bits / 8 and cache.offset == 5


def test_it_is_a_configuration_with_its_bits_and_a_name():
    model = tiny_model("llama", num_hidden_layers=2, head_dim=64)
    config = configuration.prepare(model, "llama-q4_0")
    assert config.bits == 4.5 and config.layers == [("q4_0", "q4_0")] * 2
    assert config.backend == "llama.cpp, simulated"
    turbo = configuration.prepare(model, "turbo4/turbo3", "reference")
    assert configuration.backend_of([config, turbo]) == "reference"
    window = np.random.default_rng(5).integers(0, 60, 32).astype(np.int32)
    exact = scored_logits(model, window, configuration.prepare(model, "f16/f16").make_caches())
    simulated = scored_logits(model, window, config.make_caches())
    assert 0 < mx.abs(simulated - exact).max().item() < 1


@pytest.mark.parametrize("name", ["llama-q3_0", "llama-"])
def test_names_that_are_not_simulated_are_refused(name):
    with pytest.raises(InputError, match="llama-q4_0 and llama-q5_1"):
        check_name(name)


@pytest.mark.parametrize("name", ["llama-q4_0+32,128", "mlx-kv4 + 32, 128", "LLAMA-q5_1+0,0"])
def test_other_projects_caches_have_no_protected_tokens(name):
    with pytest.raises(InputError, match=f"{re.escape(repr(name))} is another project's cache"):
        check_name(name)


def test_heads_that_llama_cpp_does_not_rotate_and_timing_are_refused():
    with pytest.raises(InputError, match="head_dim 16"):
        configuration.prepare(tiny_model("llama", num_hidden_layers=2, head_dim=16), "llama-q4_0")
    model = tiny_model("llama", num_hidden_layers=2, head_dim=64)
    with pytest.raises(InputError, match="no speed"):
        configuration.prepare(model, "llama-q5_1", timed=True)
