"""TurboKVCache: mlx-lm's protocol, memory, and bytes that do not depend on how they came."""

from __future__ import annotations

import copy
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from exact_rows import exact_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    KVCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mlx_turbokv import InputError, KVFormat, TurboKVCache
from mlx_turbokv.quant.layout import KVLayout

NAMES = ("q8_0", "turbo2", "turbo3", "turbo4", "turbo5", "turbo6", "turbo3:32", "f16")
OVERHEAD = 1.03  # resident bytes over bits per value x values / 8, at 4,096 tokens and more
MEASURED = 0.05  # growth of MLX's active memory against nbytes


def tokens(n: int, seed: int = 0, shape=(1, 2, 64)):
    rng = np.random.default_rng(seed)
    batch, heads, dim = shape
    return tuple(exact_rows(rng, batch, heads, n, dim) for _ in "kv")


def fill(cache, k, v, cuts):
    edges = [0, *sorted(cuts), k.shape[2]]
    for start, stop in zip(edges[:-1], edges[1:]):
        if stop > start:
            cache.update_and_fetch(k[:, :, start:stop], v[:, :, start:stop])
    return cache


def rows_of(cache) -> tuple[mx.array, mx.array]:
    return tuple(mx.array(np.array(x)) for x in cache.keys_and_values())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.integers(1, 700),
    st.lists(st.integers(0, 700), max_size=6),
)
def test_packed_rows_do_not_depend_on_the_cuts(k_format, v_format, n, cuts):
    k, v = tokens(n)
    whole = fill(TurboKVCache(k_format, v_format), k, v, [])
    cut = fill(TurboKVCache(k_format, v_format), k, v, [c for c in cuts if c < n])
    assert whole.offset == cut.offset == n
    for a, b in zip(rows_of(whole), rows_of(cut)):
        assert mx.array_equal(a, b).item()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([("q8_0", "turbo2"), ("turbo5", "turbo3"), ("f16", "turbo4:32")]),
    st.lists(
        st.one_of(
            st.tuples(st.just("update"), st.integers(1, 300)),
            st.tuples(st.just("trim"), st.integers(0, 320)),
            st.tuples(st.just("deepcopy"), st.just(0)),
            st.tuples(st.just("state"), st.just(0)),
        ),
        max_size=12,
    ),
)
def test_any_sequence_of_operations_equals_a_list_of_tokens(pair, operations):
    """The model of the cache: the tokens that went in and were not trimmed."""
    pool_k, pool_v = tokens(300 * 12)
    cache, kept, used = TurboKVCache(*pair), [], 0
    for name, n in operations:
        if name == "update":
            index = list(range(used, used + n))
            cache.update_and_fetch(pool_k[:, :, used : used + n], pool_v[:, :, used : used + n])
            kept, used = kept + index, used + n
        elif name == "trim":
            assert cache.trim(n) == min(n, len(kept))
            kept = kept[: len(kept) - min(n, len(kept))]
        elif name == "deepcopy":
            cache = copy.deepcopy(cache)
        else:
            cache = TurboKVCache.from_state(cache.state)
        assert cache.offset == cache.size() == len(kept)
        assert cache.empty() == (not kept)
    if not kept:
        return
    index = mx.array(kept)
    expected = TurboKVCache(*pair)
    expected.update_and_fetch(pool_k[:, :, index], pool_v[:, :, index])
    for a, b in zip(rows_of(expected), rows_of(cache)):
        assert mx.array_equal(a, b).item()


@pytest.mark.parametrize("k_format", NAMES)
@pytest.mark.parametrize("v_format", ["turbo2", "turbo5", "q8_0"])
@pytest.mark.parametrize("n", [4096, 4097, 4351, 5000])
def test_resident_bytes_are_the_formula(k_format, v_format, n):
    heads, head_dim = 3, 64
    k, v = tokens(n, shape=(1, heads, head_dim))
    k, v = k.astype(mx.float16), v.astype(mx.float16)
    cache = fill(TurboKVCache(k_format, v_format), k, v, [n - 3, n - 2, n - 1])
    bits = KVFormat.parse(k_format).bits_per_value(head_dim)
    bits += KVFormat.parse(v_format).bits_per_value(head_dim)
    formula = bits * n * heads * head_dim / 8
    assert formula <= cache.nbytes <= OVERHEAD * formula


@pytest.mark.parametrize("pair", [("q8_0", "turbo2"), ("turbo4", "turbo3"), ("f16", "turbo2")])
def test_active_memory_grows_by_nbytes(pair):
    k, v = tokens(4096, shape=(1, 3, 64))
    k, v = k.astype(mx.float16), v.astype(mx.float16)
    mx.eval(k, v)
    warm = TurboKVCache(*pair)
    warm.update_and_fetch(k[:, :, :40], v[:, :, :40])
    mx.eval(warm.state)
    del warm
    before = mx.get_active_memory()
    caches = [TurboKVCache(*pair) for _ in range(4)]
    for cache in caches:
        for start in range(0, 4096, 1024):
            cache.update_and_fetch(k[:, :, start : start + 1024], v[:, :, start : start + 1024])
            mx.eval(cache.state)
    grown = mx.get_active_memory() - before
    assert abs(grown / sum(cache.nbytes for cache in caches) - 1) < MEASURED


def test_decode_steps_do_not_copy_the_body():
    """200 steps at 16,384 tokens: the peak stays within body + 2 MiB, async steps included."""
    cache = TurboKVCache("q8_0", "turbo2", backend="reference")
    k, v = tokens(16_384, shape=(1, 1, 64))
    cache.update_and_fetch(k, v)
    mx.eval(cache.state)
    del k, v
    new = [tokens(1, seed, shape=(1, 1, 64)) for seed in range(200)]
    mx.eval(new)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for k, v in new:
        cache.update_and_fetch(k, v)
        mx.async_eval(cache.state)
    mx.eval(cache.state)
    assert cache.offset == 16_584
    assert mx.get_peak_memory() - before < 2 * 2**20


def test_save_and_load_in_a_new_process(tmp_path):
    """Through mlx-lm's own functions; the new process knows the class by importing the package."""
    k, v = tokens(333)
    cache = fill(TurboKVCache("turbo4", "turbo3"), k, v, [100, 332])
    plain = KVCache()
    plain.update_and_fetch(k, v)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, [cache, plain, TurboKVCache("q8_0", "turbo2")], {"model": "none"})
    mx.savez(str(tmp_path / "rows.npz"), *rows_of(cache))
    script = """
import sys, numpy as np, mlx_turbokv.cache.single, mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache
caches, metadata = load_prompt_cache(sys.argv[1], return_metadata=True)
assert [type(c).__name__ for c in caches] == ["TurboKVCache", "KVCache", "TurboKVCache"]
assert metadata == {"model": "none"} and caches[2].empty() and caches[0].offset == 333
rows = mx.load(sys.argv[2])
for index, got in enumerate(caches[0].keys_and_values()):
    assert mx.array_equal(mx.array(np.array(got)), rows[f"arr_{index}"]).item()
new = mx.ones((1, 2, 1, 64))
caches[2].update_and_fetch(new, new), caches[0].update_and_fetch(new, new)
print("continued", caches[0].offset)
"""
    command = [sys.executable, "-c", script, file, str(tmp_path / "rows.npz")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == "continued 334", result.stderr


def test_state_of_another_version_or_class_is_refused(tmp_path):
    cache = fill(TurboKVCache("turbo4", "turbo3"), *tokens(5), [])
    state = cache.state
    with pytest.raises(InputError, match="format version 99 cannot be read"):
        TurboKVCache.from_state([99, *state[1:]])
    with pytest.raises(InputError, match="not the state of a TurboKVCache"):
        TurboKVCache.from_state(state[:4])
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, [cache])
    assert load_prompt_cache(file)[0].offset == 5


def test_tokens_that_do_not_fit_are_refused_and_change_nothing():
    cache = fill(TurboKVCache("q8_0", "turbo2"), *tokens(40), [])
    with pytest.raises(ValueError, match="do not continue a cache"):
        cache.update_and_fetch(*tokens(1, shape=(1, 3, 64)))
    with pytest.raises(ValueError, match="do not continue a cache"):
        cache.update_and_fetch(*tokens(1, shape=(1, 2, 128)))
    assert cache.offset == 40
    with pytest.raises(InputError, match="head_dim 100 cannot be rotated"):
        TurboKVCache("turbo4", "turbo3").update_and_fetch(*tokens(1, shape=(1, 2, 100)))


def test_masks_and_trimming_are_mlx_lms():
    ours, plain = TurboKVCache("q8_0", "turbo2"), KVCache()
    for cache in (ours, plain):
        fill(cache, *tokens(50), [])
    for n, options in [(1, {}), (7, {}), (7, {"return_array": True}), (7, {"window_size": 16})]:
        options = {"return_array": False, "window_size": None, **options}
        a, b = ours.make_mask(n, **options), plain.make_mask(n, **options)
        assert type(a) is type(b)
        assert mx.array_equal(a, b).item() if isinstance(a, mx.array) else a == b
    assert trim_prompt_cache([ours], 20) == trim_prompt_cache([plain], 20) == 20
    assert ours.offset == plain.offset == 30


def test_the_newest_rows_can_be_replaced_by_themselves():
    """Pipeline-parallel models set ``keys`` to itself behind a dependency."""
    for n in (40, 512):
        cache = fill(TurboKVCache("q8_0", "turbo2"), *tokens(n), [])
        before = rows_of(cache)
        cache.keys = mx.depends(cache.keys, mx.ones((2,)))
        assert all(mx.array_equal(a, b).item() for a, b in zip(before, rows_of(cache)))


def test_layout_names_what_it_stores():
    cache = fill(TurboKVCache("turbo4", "turbo3"), *tokens(3), [])
    assert cache.layout == KVLayout(cache.k_format, cache.v_format, 64, 64, "float32")
    assert cache.layout.bits_per_value == (4.25 + 3.25) / 2


@pytest.mark.parametrize("pair", [("q8_0", "turbo2"), ("f16", "turbo4"), ("turbo3", "f16")])
def test_trimming_frees_what_is_taken_back(tmp_path, pair):
    k, v = tokens(4096)
    cache = fill(TurboKVCache(*pair), k, v, [])
    whole, layout = cache.nbytes, cache.layout
    assert cache.trim(4086) == 4086
    assert cache.nbytes <= 4 * 2 * layout.tile_words < whole / 50
    save_prompt_cache(str(tmp_path / "trimmed.safetensors"), [cache])
    assert (tmp_path / "trimmed.safetensors").stat().st_size <= 8 * layout.tile_words + 4096
    few = fill(TurboKVCache(*pair), k[:, :, :10], v[:, :, :10], [])
    for a, b in zip(rows_of(cache), rows_of(few)):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("n", [4096 - 40, 4096 - 300, 2100, 2048])
def test_a_saved_cache_holds_no_stale_rows(tmp_path, n):
    k, v = tokens(4096)
    cache = fill(TurboKVCache("q8_0", "turbo2"), k, v, [])
    cache.trim(4096 - n)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, [cache])
    (loaded,) = load_prompt_cache(path)
    assert loaded.nbytes <= 2 * 4 * loaded.layout.tile_words * (n // 32 + 1)
    for a, b in zip(rows_of(cache), rows_of(loaded)):
        assert np.array_equal(a, b)


DTYPES = (mx.float16, mx.bfloat16, mx.float32)
# of the largest value: half a step of q8_0, and a rounding to bfloat16 on the way in and out
DTYPE_TOLERANCE = 1 / 254 + 2**-8


@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
@pytest.mark.parametrize(
    "pair", [("q8_0", "f16"), ("f16", "q8_0"), ("f16", "f16"), ("q8_0", "q8_0")]
)
def test_any_dtype_may_meet_any(first, second, pair):
    """K in one type and V in another, then the other way round, as mlx-lm's cache takes them."""
    k, v = tokens(40)
    ours, theirs = TurboKVCache(*pair), KVCache()
    for start, stop, kd, vd in (
        (0, 20, first, second),
        (20, 39, second, first),
        (39, 40, mx.float32, first),
    ):
        rows = k[:, :, start:stop].astype(kd), v[:, :, start:stop].astype(vd)
        got = ours.update_and_fetch(*rows)
        want = theirs.update_and_fetch(*rows)
    assert [x.dtype for x in got] == [mx.float32, first]
    for a, b in zip(got, want):
        a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
        assert np.abs(a - b).max() <= DTYPE_TOLERANCE * np.abs(b).max()


@pytest.mark.parametrize("name", ["f16", "q8_0", "turbo4"])
def test_a_cache_saved_in_one_dtype_goes_on_in_another(tmp_path, name):
    k, v = (x.astype(mx.bfloat16) for x in tokens(50))
    cache = fill(TurboKVCache(name, name), k[:, :, :49], v[:, :, :49], [])
    expected = fill(TurboKVCache(name, name), k, v, [])
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, [cache])
    for dtype in DTYPES:
        (loaded,) = load_prompt_cache(path)
        loaded.update_and_fetch(k[:, :, 49:].astype(dtype), v[:, :, 49:].astype(dtype))
        for a, b in zip(loaded.keys_and_values(mx.float32), expected.keys_and_values(mx.float32)):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("name", ["f16", "q8_0", "turbo3"])
def test_an_update_of_no_tokens_changes_nothing(name):
    k, v = tokens(5)
    nothing = k[:, :, :0], v[:, :, :0]
    cache = TurboKVCache(name, name)
    assert [x.shape for x in cache.update_and_fetch(*nothing)] == [(1, 2, 0, 64)] * 2
    assert cache.empty() and cache.offset == 0
    cache.update_and_fetch(k, v)
    before = rows_of(cache)
    got = cache.update_and_fetch(*nothing)
    assert cache.offset == 5 and [x.shape for x in got] == [(1, 2, 5, 64)] * 2
    for a, b in zip(rows_of(cache), before):
        assert np.array_equal(a, b)


def test_caches_of_two_kinds_are_not_merged():
    k, v = tokens(5)
    packed, plain = fill(TurboKVCache("q8_0", "turbo2"), k, v, []), KVCache()
    plain.update_and_fetch(k, v)
    with pytest.raises(ValueError, match="KVCache.*before the packed cache was attached"):
        TurboKVCache.merge([packed, plain])
    other = fill(TurboKVCache("q8_0", "turbo3"), k, v, [])
    with pytest.raises(ValueError, match="different formats"):
        TurboKVCache.merge([packed, other])
    batch = TurboKVCache.merge([packed, packed])
    with pytest.raises(ValueError, match="KVCache"):
        batch.extend(plain)


def test_caches_of_two_dtypes_are_merged_where_rows_are_quantised():
    k, v = tokens(5)
    caches = [
        fill(TurboKVCache("q8_0", "turbo2"), k.astype(dtype), v.astype(dtype), [])
        for dtype in (mx.float16, mx.bfloat16)
    ]
    batch = TurboKVCache.merge(caches)
    for i, cache in enumerate(caches):
        for a, b in zip(
            batch.extract(i).keys_and_values(mx.float32), cache.keys_and_values(mx.float32)
        ):
            assert np.array_equal(a, b)
