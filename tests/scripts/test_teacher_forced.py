"""Teacher-forced codes: near-ties pass, and nothing else does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from teacher_forced import TeacherForcedCache

from mlx_turbokv import TurboKVCache

N = 3000
PAIRS = [("q8_0", "turbo2"), ("turbo4", "turbo3"), ("turbo6", "turbo5")]


def forced(pair, keys, values, noise: float) -> tuple[TeacherForcedCache, TurboKVCache]:
    """Packs rows, and the same rows moved by ``noise``, with the first as the source."""
    rng = np.random.default_rng(1)
    source = TurboKVCache(*pair, backend="reference")
    source.update_and_fetch(mx.array(keys), mx.array(values))
    cache = TeacherForcedCache(source, "reference")
    moved = [x * (1 + noise * rng.standard_normal(x.shape)) for x in (keys, values)]
    cache.update_and_fetch(*(mx.array(x.astype(np.float32)) for x in moved))
    return cache, source


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 2, N, 64)).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("pair", PAIRS)
def test_rounding_changes_codes_that_are_near_ties(rows, pair):
    cache, source = forced(pair, *rows, noise=3e-5)
    assert cache.n_codes == 2 * 2 * N * 64
    assert 0 < cache.n_differing < 1e-3 * cache.n_codes
    assert cache.n_wrong == 0
    for ours, theirs in zip(cache.keys_and_values(), source.keys_and_values()):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("pair", PAIRS)
def test_more_than_rounding_is_wrong(rows, pair):
    cache, _ = forced(pair, *rows, noise=3e-2)
    assert cache.n_wrong > 0.2 * cache.n_differing


def test_a_source_may_grow_in_step_or_be_ahead(rows):
    """Rows in uneven updates, past a flush of the tail: forced as those given at once are."""
    cuts = [0, 40, 41, 42, 130, 131, 259, 260, 300]
    ahead, in_step = (TurboKVCache("turbo4", "turbo3", backend="reference") for _ in range(2))
    ahead.update_and_fetch(*(mx.array(x[:, :, :400]) for x in rows))
    caches = [TeacherForcedCache(source, "reference") for source in (ahead, in_step)]
    moved = [x * (1 + 3e-5 * np.random.default_rng(1).standard_normal(x.shape)) for x in rows]
    for first, last in zip(cuts, cuts[1:]):
        in_step.update_and_fetch(*(mx.array(x[:, :, first:last]) for x in rows))
        new = [mx.array(x[:, :, first:last].astype(np.float32)) for x in moved]
        for cache in caches:
            cache.update_and_fetch(*new)
            for ours, theirs in zip(cache.keys_and_values(), in_step.keys_and_values()):
                assert np.array_equal(ours, theirs)
    for cache in caches:
        assert (cache.n_codes, cache.n_wrong) == (2 * 2 * 300 * 64, 0)
        assert cache.n_differing > 0
