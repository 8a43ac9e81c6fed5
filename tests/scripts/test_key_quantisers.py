"""The quantisers that were tried: the plain one is turbo's own, allocations keep to their bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from key_quantisers import EXACT, Group, Scheme, allocated, uniform  # noqa: E402

from mlx_turbokv.cache import TurboKVCache  # noqa: E402

HEADS, DIM = 3, 64


def keys(n=40, seed=0) -> mx.array:
    return 3 * mx.random.normal((1, HEADS, n, DIM), key=mx.random.key(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_one_group_a_head_is_a_turbo_row(bits):
    x = keys()
    cache = TurboKVCache(f"turbo{bits}", "f16", "reference")
    cache.update_and_fetch(x, x)
    read = uniform(bits, HEADS, DIM)(x)
    assert np.allclose(np.array(read), np.array(cache.keys_and_values()[0]), rtol=1e-5, atol=1e-5)
    assert uniform(bits, HEADS, DIM).bits_per_value == bits + 16 / DIM


def test_exact_groups_and_groups_that_are_not_stored():
    half = tuple(range(0, DIM, 2)), tuple(range(1, DIM, 2))
    scheme = Scheme(
        ((Group(half[0], EXACT), Group(half[1], 0)),) * HEADS, np.full((HEADS, DIM), 2.0)
    )
    read, x = np.array(scheme(keys())), np.array(keys())
    assert np.array_equal(read[..., ::2], x[..., ::2]) and not read[..., 1::2].any()


def test_a_shared_norm_counts_once():
    one = uniform(4, HEADS, DIM, norm="layer")
    assert one.bits_per_value == 4 + 16 / (HEADS * DIM)
    assert np.abs(np.array(one(keys()) - keys())).max() < 2


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_allocations_keep_to_the_bits_and_lower_the_error(scaled, shared):
    rng = np.random.default_rng(0)
    q, k = np.exp(1.5 * rng.standard_normal((2, 32)))
    groups, error = allocated(q, k, 3, scaled, shared)
    assert sorted(np.concatenate([pairs for pairs, _ in groups]).tolist()) == list(range(32))
    norms = 1 if shared else sum(bits > 0 for _, bits in groups)
    assert sum(2 * len(pairs) * bits for pairs, bits in groups) + 16 * norms <= DIM * 3 + 16
    assert error < 1


def test_even_energy_is_one_group():
    groups, error = allocated(np.ones(32), np.ones(32), 3, False, False)
    assert [bits for _, bits in groups] == [3] and error == pytest.approx(1)


def test_the_promised_error_is_what_scores_have():
    """Queries and keys of uneven energy, independent: mean squared error of q.k over that of one group."""
    rng = np.random.default_rng(1)
    q, k = np.exp(rng.standard_normal((2, 32)))
    groups, promised = allocated(q, k, 3, False, False)

    def rows(energy, n=2000):
        return np.repeat(np.sqrt(energy / 2), 2) * rng.standard_normal((n, DIM))

    x, queries = rows(k).astype(np.float32), rows(q)
    by_energy = Scheme(
        (tuple(Group(tuple(np.sort([2 * p, 2 * p + 1], axis=None).tolist()), b) for p, b in groups),),
        np.ones((1, DIM)),
    )  # fmt: skip
    errors = [
        np.square(
            ((np.array(scheme(mx.array(x)[None, None]))[0, 0] - x) * queries).sum(axis=1)
        ).mean()
        for scheme in (by_energy, uniform(3, 1, DIM))
    ]
    assert errors[0] / errors[1] == pytest.approx(promised, rel=0.25)
