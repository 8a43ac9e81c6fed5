"""What mlx-vlm asks of caches: batches of a cache's kind, and copies for its prefix cache."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map

from mlx_turbokv import TurboKVCache, TurboRotatingKVCache
from mlx_turbokv.attention.hook import AttentionFunctions

HEADS, DIM, WINDOW = 2, 32, 24
MAKERS = {
    "growing": lambda: TurboKVCache("turbo4", "turbo3", "reference"),
    "protected": lambda: TurboKVCache("turbo3", "turbo2", "reference", sink=32, recent=64),
    "window": lambda: TurboRotatingKVCache("q8_0", "turbo4", WINDOW, 0, "reference"),
}
of_every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def rows(n: int, seed: int, batch: int = 1) -> tuple[mx.array, mx.array]:
    keys = map(mx.random.key, (seed, seed + 1))
    return tuple(mx.random.normal((batch, HEADS, n, DIM), key=key) for key in keys)


def seen(cache: Any) -> list[np.ndarray]:
    """All that attention may read of one sequence; windows hold some rows more."""
    n = WINDOW if isinstance(cache, TurboRotatingKVCache) else cache.size()
    return [np.array(x)[:, :, -n:] for x in cache.keys_and_values(mx.float32)]


def same(a: Any, b: Any) -> None:
    assert np.array_equal(a.offset, b.offset)
    for x, y in zip(seen(a), seen(b), strict=True):
        np.testing.assert_array_equal(x, y)


def restored(cache: Any, snapshot: dict) -> Any:
    """A cache made as mlx-vlm makes one for its prefix cache: without ``__init__``, of copies."""
    new = type(cache).__new__(type(cache))
    new.prefix_cache_restore(tree_map(lambda x: x + 0 if isinstance(x, mx.array) else x, snapshot))
    return new


@of_every_kind
@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 150), more=st.integers(1, 40), trim=st.integers(0, 9))
def test_a_restored_snapshot_goes_on_as_the_cache_did(make, n: int, more: int, trim: int) -> None:
    cache = make()
    cache.handles = AttentionFunctions(nn.Module())
    cache.update_and_fetch(*rows(n, 0))
    snapshot, alone = cache.prefix_cache_snapshot(), copy.deepcopy(cache)
    copied = restored(cache, snapshot)
    cache.update_and_fetch(*rows(33, 5))  # what the cache does later changes no snapshot
    assert copied.handles is cache.handles
    same(copied, alone)
    for held in (copied, alone):
        if held.is_trimmable():
            held.trim(min(trim, n - 1))
        held.update_and_fetch(*rows(more, 9))
    same(copied, alone)


@of_every_kind
def test_an_empty_cache_is_restored_too(make) -> None:
    copied = restored(make(), make().prefix_cache_snapshot())
    assert copied.empty() and copied.nbytes == 0


@of_every_kind
def test_state_alone_makes_a_cache_with_or_without_mlx_vlms_second_argument(make) -> None:
    cache = make()
    cache.update_and_fetch(*rows(50, 0))
    same(type(cache).from_state(cache.state), cache)
    same(type(cache).from_state(cache.state, cache.meta_state), cache)


@of_every_kind
def test_a_batch_of_a_caches_kind_holds_what_each_sequence_would(make) -> None:
    lengths, n = [40, 23], 40
    batch = make().to_batch([n - length for length in lengths])
    keys, values = rows(n, 3, batch=2)
    batch.update_and_fetch(keys, values)
    for i, length in enumerate(lengths):
        alone = make()
        alone.update_and_fetch(keys[i : i + 1, :, n - length :], values[i : i + 1, :, n - length :])
        assert batch.offset[i].item() == length == alone.offset
        same(batch.extract(i), alone)


@of_every_kind
def test_a_batch_of_a_caches_kind_has_its_handles(make) -> None:
    cache = make()
    cache.handles = AttentionFunctions(nn.Module())
    assert cache.to_batch([0, 2]).handles is cache.handles


@of_every_kind
def test_rows_of_the_prefix_cache_become_one_batch(make) -> None:
    caches = [make(), make()]
    for i, cache in enumerate(caches):
        cache.update_and_fetch(*rows(20 + 13 * i, i))
    merged = caches[0].prefix_cache_merge(caches, [20, 33])
    same(merged, type(caches[0]).merge(caches))
    for i, cache in enumerate(caches):
        same(merged.extract(i), cache)


def test_rows_of_two_kinds_are_no_batch_and_batches_are_not_merged() -> None:
    growing, window = MAKERS["growing"](), MAKERS["window"]()
    assert growing.prefix_cache_merge([growing, window], [0, 0]) is None
    batch = growing.to_batch([0])
    assert batch.prefix_cache_merge([batch], [0]) is None
