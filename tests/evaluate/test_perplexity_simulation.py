"""The package's losses against the NumPy simulation, and the simulation against itself.

docs/results/long-checks.md has the same on the default model and wikitext-2.
"""

from __future__ import annotations

import numpy as np
import pytest
from simulation import (
    SCALE_RULES,
    SimulatedCache,
    layer_formats,
    lloyd_max,
    rotation,
    share_asked,
    simulate,
    window_nll,
)
from tiny_models import tiny_model

from mlx_turbokv.evaluate.configuration import prepare
from mlx_turbokv.evaluate.divergence import Reference
from mlx_turbokv.evaluate.names import DEFAULT_CONFIGS
from mlx_turbokv.evaluate.windows import scored_logits, targets_of
from mlx_turbokv.quant import codebook

NLL_TOLERANCE = 2e-3  # nats, of a window's mean loss
MOST_TIES = 0.03  # share of decisions with a look at what was stored; turbo6 has 63 borders
N_LAYERS = 12  # enough for every policy of the table


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=N_LAYERS)


@pytest.fixture(scope="module")
def window():
    return np.random.default_rng(0).integers(0, 60, 160).astype(np.int32)


@pytest.mark.parametrize("name", [*DEFAULT_CONFIGS, "turbo6/turbo5", "turbo3:32/turbo2:32"])
def test_losses_agree_with_the_simulation(model, window, name):
    """Without protected tokens, which the simulation has not."""
    caches = prepare(model, f"{name}+0,0").make_caches()
    reference = Reference(scored_logits(model, window, caches), targets_of(window))
    simulated = [
        SimulatedCache(k, v, "unbiased", "unbiased", stored=cache.keys_and_values())
        for cache, (k, v) in zip(caches, layer_formats(name, N_LAYERS))
    ]
    expected = window_nll(model, window.tolist(), simulated)
    assert abs(reference.own_stats().nll.mean() - expected.mean()) <= NLL_TOLERANCE
    assert share_asked(simulated) <= MOST_TIES


def test_a_wrong_scale_rule_does_not_pass(model, window):
    """Teacher-forced codes decide ties alone: other numbers still differ."""
    caches = prepare(model, "turbo2/turbo2+0,0").make_caches()
    reference = Reference(scored_logits(model, window, caches), targets_of(window))
    simulated = [
        SimulatedCache("turbo2", "turbo2", "raw", "raw", c.keys_and_values()) for c in caches
    ]
    expected = window_nll(model, window.tolist(), simulated)
    assert abs(reference.own_stats().nll.mean() - expected.mean()) > NLL_TOLERANCE


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_codebooks_agree_with_a_second_computation(bits, width):
    np.testing.assert_allclose(codebook.codebook(bits, width), lloyd_max(bits, width), atol=5e-5)


def test_simulated_rotation_is_orthonormal():
    r = rotation(64)
    np.testing.assert_allclose(r @ r.T, np.eye(64), atol=1e-12)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_simulated_error_is_near_the_published_one(rule):
    x = np.random.default_rng(0).normal(size=(400, 128))
    error = np.mean((simulate(x, "turbo3", rule) - x) ** 2) / np.mean(x**2)
    published = {"raw": 0.0340, "matched": 0.0338, "least_squares": 0.0335}
    # The unbiased scale is longer than least squares by 1 / (1 - error): no figure is published.
    assert error == pytest.approx(published.get(rule, 0.0347), rel=0.03)
