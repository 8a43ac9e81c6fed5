"""Errors over windows: against closed forms, simulation and NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_turbokv.evaluate import statistics

LISTS = st.lists(st.floats(-100, 100), min_size=2, max_size=40)


@given(LISTS)
def test_standard_error_is_the_sample_deviation_over_root_n(values):
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
    expected = (variance / len(values)) ** 0.5
    assert statistics.standard_error(values) == pytest.approx(expected, abs=1e-9)


def test_one_value_has_no_standard_error():
    assert statistics.standard_error([3.0]) is None
    assert statistics.bootstrap_interval([3.0]) is None


@settings(deadline=None)
@given(LISTS)
def test_bootstrap_interval_stays_within_the_values_and_repeats(values):
    low, high = statistics.bootstrap_interval(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert statistics.bootstrap_interval(values) == (low, high)


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = statistics.bootstrap_interval(rng.normal(2.0, 1.0, 40), samples=400)
        hits += low <= 2.0 <= high
    assert 0.88 <= hits / 200 <= 0.98


def test_block_error_sees_what_windows_share():
    # Tokens that differ only by window: the token error believes in 400 independent values.
    windows = [np.full(100, x) for x in (1.0, 2.0, 3.0, 4.0)]
    summary = statistics.block_summary(windows)
    assert summary["mean"] == 2.5
    assert summary["se_over"] == "windows"
    assert summary["se"] == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
    assert summary["se_tokens"] < summary["se"] / 5


def test_one_window_falls_back_to_tokens_and_says_so():
    summary = statistics.block_summary([np.array([1.0, 2.0, 3.0])])
    assert summary["se_over"] == "tokens"
    assert summary["se"] == pytest.approx(1 / 3**0.5)
    assert summary["interval"] is None


def test_perplexity_and_its_error_follow_llama_perplexity():
    nll = np.random.default_rng(0).exponential(3.0, 255)
    found = statistics.perplexity([nll])
    # As that program sums it: variance from the mean of squares, over n - 1.
    variance = np.mean(nll**2) - np.mean(nll) ** 2
    assert found["ppl"] == pytest.approx(np.exp(np.mean(nll)))
    assert found["se"] == pytest.approx(found["ppl"] * np.sqrt(variance / (nll.size - 1)))


def test_percentiles_are_ordered():
    found = list(statistics.percentiles(np.random.default_rng(0).normal(size=999)).values())
    assert found == sorted(found)


@given(st.integers(1, 300), st.integers(1, 12))
def test_position_buckets_cover_every_position_once(n, n_buckets):
    values = [np.arange(n, dtype=float), np.arange(n, dtype=float) + 1]
    buckets = statistics.by_position(values, 256, n_buckets)
    spans = [b["positions"] for b in buckets]
    assert spans[0][0] == 256 and spans[-1][1] == 256 + n
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    total = sum(b["mean"] * (b["positions"][1] - b["positions"][0]) for b in buckets)
    assert total == pytest.approx(sum(w.sum() for w in values) / 2)


@given(LISTS, st.floats(0.1, 10))
def test_a_ratio_of_proportional_windows_is_exact(values, factor):
    """Paired resampling: whatever windows are drawn, the factor is the same."""
    b = np.abs(values) + 1
    found = statistics.ratio(factor * b, b)
    assert found["mean"] == pytest.approx(factor)
    assert found["interval"] == pytest.approx((factor, factor))


def test_ratios_that_cannot_be_formed():
    assert statistics.ratio([1.0], [2.0]) == {"mean": 0.5, "interval": None}
    assert statistics.ratio([1.0, 2.0], [0.0, 0.0])["mean"] is None
    with pytest.raises(ValueError, match="paired"):
        statistics.ratio([1.0], [1.0, 2.0])


def test_a_ratio_interval_covers_the_true_ratio_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        b = rng.gamma(4.0, 1.0, 40)
        low, high = statistics.ratio(b * rng.gamma(50.0, 0.01, 40), b)["interval"]
        hits += low <= 0.5 <= high
    assert 175 <= hits <= 199  # 95 % of 200, with its chance and the small sample


def test_percentile_intervals_are_those_of_the_pooled_tokens():
    """Against percentiles of each resample, its windows' tokens put one after the other."""
    rng = np.random.default_rng(4)
    windows = [rng.exponential(1 + i % 3, 20) for i in range(12)]
    marks = {"median": 50, "p90": 90}
    found = statistics.percentile_intervals(windows, marks)
    drawn = np.random.default_rng(statistics.BOOTSTRAP_SEED).integers(0, 12, (2000, 12))
    pooled = [np.concatenate([windows[i] for i in sample]) for sample in drawn]
    for name, mark in marks.items():
        at = [np.percentile(p, mark, method="inverted_cdf") for p in pooled]
        np.testing.assert_allclose(found[name], np.percentile(at, [2.5, 97.5]), rtol=1e-12)
    assert statistics.percentile_intervals(windows[:1], marks) is None
