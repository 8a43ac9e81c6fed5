"""Attention over packed rows against NumPy in float64 over the dequantised values."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_turbokv import TurboKVCache
from mlx_turbokv.attention.arrays import TurboArray
from mlx_turbokv.kernels import heads

RELATIVE = 1e-5  # float32 attention against float64, logits up to about 20
PAIRS = [("q8_0", "turbo2"), ("turbo4", "turbo3"), ("f16", "turbo6"), ("turbo5:32", "q8_0")]


def oracle(q, k, v, scale, mask=None, sinks=None):
    """Softmax attention in float64; bool or additive mask; grouped heads."""
    q, k, v = (np.asarray(x.astype(mx.float32), dtype=np.float64) for x in (q, k, v))
    factor = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, factor, 1), np.repeat(v, factor, 1)
    scores = scale * q @ k.swapaxes(-1, -2)
    if isinstance(mask, str):
        n_q, n_k = scores.shape[-2:]
        mask = np.tril(np.ones((n_q, n_k), bool), n_k - n_q)
    if mask is not None:
        mask = np.asarray(mask)
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, np.asarray(sinks, np.float64)[None, :, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64)[None, :, None, None] - top)
    return weights / total @ v


def filled(pair, n, heads=2, k_head_dim=64, v_head_dim=64, batch=1, dtype=mx.float32):
    mx.random.seed(n)
    cache = TurboKVCache(*pair, backend="reference")
    k = mx.random.normal((batch, heads, n, k_head_dim)).astype(dtype)
    v = mx.random.normal((batch, heads, n, v_head_dim)).astype(dtype)
    return cache, cache.update_and_fetch(k, v)


def relative_error(got, expected):
    got = np.asarray(got.astype(mx.float32), dtype=np.float64)
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("n_q", "mask"), [(1, None), (5, "causal"), (40, "causal")])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (80, 80)])
def test_attention_equals_float64(pair, n_q, mask, dims):
    _, (k, v) = filled(pair, 333, k_head_dim=dims[0], v_head_dim=dims[1])
    q = mx.random.normal((1, 6, n_q, dims[0]))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    assert out.shape == (1, 6, n_q, dims[1])
    assert relative_error(out, oracle(q, k, v, 0.3, mask)) < RELATIVE


@pytest.mark.parametrize("pair", PAIRS)
def test_masks_and_sinks(pair):
    _, (k, v) = filled(pair, 90, batch=2)
    q = mx.random.normal((2, 6, 7, 64))
    allowed = mx.random.uniform(shape=(2, 1, 7, 90)) < 0.6
    additive = mx.random.normal((2, 6, 7, 90))
    sinks = mx.random.normal((6,))
    for mask in (allowed, additive):
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask, sinks=sinks)
        assert relative_error(out, oracle(q, k, v, 0.2, mask, sinks)) < RELATIVE


def test_kv_heads_in_slices_change_nothing(monkeypatch):
    _, (k, v) = filled(("turbo4", "turbo3"), 100, heads=5)
    q, mask = mx.random.normal((1, 15, 12, 64)), mx.random.normal((1, 15, 12, 100))
    sinks = mx.random.normal((15,))
    options = {"scale": 0.2, "mask": mask, "sinks": sinks}
    whole = mx.fast.scaled_dot_product_attention(q, k, v, **options)
    monkeypatch.setattr(heads, "TRANSIENT_BYTES", 2 * 100 * 128 * 4)
    sliced = mx.fast.scaled_dot_product_attention(q, k, v, **options)
    assert mx.allclose(whole, sliced, atol=1e-6).item()


def test_packed_rows_are_read_and_nothing_is_dequantised():
    """The interception is what runs: dequantised values that would be wrong are not looked at."""
    cache, (k, v) = filled(("q8_0", "turbo2"), 50)
    assert type(k) is TurboArray and type(v) is TurboArray
    q = mx.random.normal((1, 4, 1, 64))
    expected = oracle(q, k, v, 0.1)
    poisoned = [TurboArray(mx.full(x.shape, mx.nan)) for x in (k, v)]
    for x, y in zip(poisoned, (k, v)):
        x.source, x.is_keys = y.source, y.is_keys
    out = mx.fast.scaled_dot_product_attention(q, *poisoned, scale=0.1)
    assert relative_error(out, expected) < RELATIVE


def test_operations_on_the_lazy_arrays_give_plain_dequantised_values():
    """A model with its own attention maths, or one that changes K before attention."""
    cache, (k, v) = filled(("turbo4", "q8_0"), 40, heads=3)
    q = mx.random.normal((1, 3, 2, 64))
    by_hand = mx.softmax(0.1 * q @ k.swapaxes(-1, -2), axis=-1) @ v
    assert type(by_hand) is mx.array
    assert relative_error(by_hand, oracle(q, k, v, 0.1)) < 1e-5
    changed = mx.fast.scaled_dot_product_attention(q, k * 2, v, scale=0.1)
    assert relative_error(changed, oracle(q, k * 2, v, 0.1)) < 1e-5


def test_keys_of_one_cache_and_values_of_another_are_not_mixed_up():
    _, (k, _) = filled(("turbo4", "turbo4"), 30)
    _, (_, v) = filled(("turbo4", "turbo4"), 30, batch=1)
    q = mx.random.normal((1, 2, 1, 64))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1)
    assert relative_error(out, oracle(q, k, v, 0.1)) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_output_keeps_the_queries_dtype(dtype):
    _, (k, v) = filled(("f16", "turbo3"), 20, dtype=dtype)
    assert k.dtype == dtype and v.dtype == dtype
    out = mx.fast.scaled_dot_product_attention(
        mx.random.normal((1, 4, 1, 64)).astype(dtype), k, v, scale=0.1
    )
    assert out.dtype == dtype


def test_plain_arrays_go_to_mlx():
    q, k, v = (mx.random.normal((1, 2, 9, 64)) for _ in "qkv")
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask="causal")
    assert relative_error(out, oracle(q, k, v, 0.1, "causal")) < RELATIVE
