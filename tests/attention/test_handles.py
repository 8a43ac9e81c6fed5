"""K and V without arrays behind them, for models that only pass them on to attention."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from tiny_models import architectures, shared_model

from mlx_turbokv import TurboKVCache, make_prompt_cache
from mlx_turbokv.attention.arrays import Handle, TurboArray
from mlx_turbokv.attention.hook import AttentionFunctions
from mlx_turbokv.cache import TurboRotatingKVCache
from mlx_turbokv.cache.summary import leaves
from mlx_turbokv.model.kv_layers import kv_layers

# they repeat, reshape or multiply K and V themselves
OWN_MATHS = {"gear", "gemma2", "olmo", "phi3small", "plamo", "stablelm"}
NEEDS_A_GPU = {"bitnet", "muse_spark"}


def _rows(n: int, seed: int) -> mx.array:
    return mx.random.normal((1, 2, n, 64), key=mx.random.key(seed)).astype(mx.float16)


def _pair(make) -> list:
    """Two caches with the same rows: one that answers with handles, one with arrays."""
    caches = [make(), make()]
    caches[0].handles = AttentionFunctions(nn.Module())
    for cache in caches:
        cache.update_and_fetch(_rows(40, 1), _rows(40, 2))
    return caches


MAKERS = {
    "growing": lambda: TurboKVCache("turbo4", "turbo3", "reference"),
    "window": lambda: TurboRotatingKVCache("q8_0", "turbo2", 24, 0, "reference"),
    "window that keeps": lambda: TurboRotatingKVCache("q8_0", "turbo2", 24, 4, "reference"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_handle_is_attended_as_its_array_is(make) -> None:
    queries, outputs = mx.random.normal((1, 4, 1, 64)).astype(mx.float16), []
    for cache, kind in zip(_pair(make), (Handle, TurboArray)):
        keys, values = cache.update_and_fetch(_rows(1, 3), _rows(1, 4))
        assert type(keys) is type(values) is kind
        outputs.append(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1))
    assert mx.array_equal(*outputs)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_rows_cut_off_a_handle_are_those_of_its_array(make) -> None:
    (handles, arrays) = (c.update_and_fetch(_rows(1, 3), _rows(1, 4)) for c in _pair(make))
    for handle, array in zip(handles, arrays):
        assert mx.array_equal(handle[:, :, 5:, :], array[:, :, 5:, :])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_handle_says_what_its_array_is(make) -> None:
    (handles, arrays) = (c.update_and_fetch(_rows(1, 3), _rows(1, 4)) for c in _pair(make))
    for handle, array in zip(handles, arrays):
        assert (handle.shape, handle.ndim, handle.dtype) == (array.shape, array.ndim, array.dtype)


def test_handles_that_are_no_pair_are_dequantised() -> None:
    """Keys of one cache with values of another, which no packed attention reads."""
    (one, _), (two, _) = _pair(MAKERS["growing"]), _pair(MAKERS["growing"])
    two.update_and_fetch(_rows(1, 5), _rows(1, 6))
    one.update_and_fetch(_rows(1, 5), _rows(1, 6))
    keys, _ = one.update_and_fetch(_rows(1, 7), _rows(1, 8))
    _, values = two.update_and_fetch(_rows(1, 7), _rows(1, 9))
    queries = mx.random.normal((1, 4, 1, 64)).astype(mx.float16)
    mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1)
    plain = mx.fast.scaled_dot_product_attention(
        queries, one.keys_and_values()[0] * 1, two.keys_and_values()[1] * 1, scale=0.1
    )
    assert mx.array_equal(mixed, plain)


def test_several_tokens_are_answered_by_arrays() -> None:
    handles, _ = _pair(MAKERS["growing"])
    assert type(handles.update_and_fetch(_rows(2, 3), _rows(2, 4))[0]) is TurboArray


@pytest.mark.parametrize("name", sorted(set(architectures()) - NEEDS_A_GPU))
def test_models_get_handles_unless_they_do_more_with_k_and_v(name: str) -> None:
    model = shared_model(name)
    packed = [c for c in leaves(make_prompt_cache(model, "q8_0", "q8_0")) if hasattr(c, "handles")]
    assert len(packed) == len(kv_layers(model).layers)
    assert {cache.handles is not None for cache in packed} <= {name not in OWN_MATHS}


def test_batches_and_copies_answer_as_their_sequences_do() -> None:
    with_handles, with_arrays = _pair(MAKERS["growing"])
    merge = TurboKVCache.merge
    assert copy.deepcopy(with_handles).handles
    assert merge([with_handles, with_handles]).handles
    assert merge([with_handles, with_handles]).extract(1).handles
    assert not merge([with_handles, with_arrays]).handles
    batch = merge([with_handles])
    batch.extend(merge([with_arrays]))
    assert not batch.handles
    window, other = _pair(MAKERS["window"])
    assert TurboRotatingKVCache.merge([window, window]).extract(0).handles
    assert not TurboRotatingKVCache.merge([window, other]).handles
