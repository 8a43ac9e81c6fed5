"""The GPU check's referee: it settles near-ties, and lets nothing else pass."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from witnessed import WitnessedCache  # noqa: E402

from mlx_turbokv import TurboKVCache  # noqa: E402

N = 3000
PAIRS = [("q8_0", "turbo2"), ("turbo4", "turbo3"), ("turbo6", "turbo5")]


def settled(pair, keys, values, noise: float) -> tuple[WitnessedCache, TurboKVCache]:
    """Packs rows, and the same rows moved by ``noise``, with the first as the witness."""
    rng = np.random.default_rng(1)
    witness = TurboKVCache(*pair, backend="reference")
    witness.update_and_fetch(mx.array(keys), mx.array(values))
    cache = WitnessedCache(witness, "reference")
    moved = [x * (1 + noise * rng.standard_normal(x.shape)) for x in (keys, values)]
    cache.update_and_fetch(*(mx.array(x.astype(np.float32)) for x in moved))
    return cache, witness


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 2, N, 64)).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("pair", PAIRS)
def test_rounding_turns_codes_and_is_settled(rows, pair):
    cache, witness = settled(pair, *rows, noise=3e-5)
    assert cache.n_codes == 2 * 2 * N * 64
    assert 0 < cache.n_turned < 1e-3 * cache.n_codes
    assert cache.n_wrong == 0
    for ours, theirs in zip(cache.keys_and_values(), witness.keys_and_values()):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("pair", PAIRS)
def test_more_than_rounding_is_wrong(rows, pair):
    cache, _ = settled(pair, *rows, noise=3e-2)
    assert cache.n_wrong > 0.2 * cache.n_turned


def test_a_witness_may_grow_in_step_or_be_ahead(rows):
    """Rows in uneven updates, past a flush of the tail: settled as those given at once are."""
    cuts = [0, 40, 41, 42, 130, 131, 259, 260, 300]
    ahead, in_step = (TurboKVCache("turbo4", "turbo3", backend="reference") for _ in range(2))
    ahead.update_and_fetch(*(mx.array(x[:, :, :400]) for x in rows))
    caches = [WitnessedCache(witness, "reference") for witness in (ahead, in_step)]
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
        assert cache.n_turned > 0
