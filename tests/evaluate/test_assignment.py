"""The assignment under a budget: exact against brute force, and costs made to fall with size."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate.assignment import assign, monotone

SUM_TOLERANCE = 1e-12  # sums of a few numbers up to 10 in another order


@st.composite
def problems(draw):
    """Costs and sizes of up to five slots with up to four choices, some not open, and budgets."""
    n_slots, n_choices = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    unit = draw(st.sampled_from([1, 2, 34]))
    cost = st.one_of(st.floats(-2, 10), st.sampled_from([0.0, 1.0, np.inf]))
    costs = np.array(
        draw(st.lists(cost, min_size=n_slots * n_choices, max_size=n_slots * n_choices))
    )
    costs = costs.reshape(n_slots, n_choices)
    costs[:, 0] = np.where(costs[:, 0] < np.inf, costs[:, 0], 1.0)
    size = st.integers(1, 9)
    sizes = draw(st.lists(size, min_size=costs.size, max_size=costs.size))
    sizes = unit * np.array(sizes).reshape(costs.shape)
    return costs, sizes, unit


def _best(costs, sizes, budget):
    """Least cost, and fewest bytes that reach it, over all assignments."""
    slots = np.arange(len(costs))
    found = [
        (costs[slots, list(at)].sum(), sizes[slots, list(at)].sum())
        for at in product(range(costs.shape[1]), repeat=len(costs))
    ]
    allowed = [f for f in found if f[1] <= budget and f[0] < np.inf]
    return min(allowed) if allowed else None


@given(problems(), st.lists(st.integers(0, 50), min_size=1, max_size=3))
def test_least_cost_within_each_budget(problem, extra):
    costs, sizes, unit = problem
    is_open = costs < np.inf
    least = int(np.where(is_open, sizes, 10**6).min(axis=1).sum())
    budgets = [least + more * unit // 2 for more in extra]
    slots = np.arange(len(costs))
    for budget, choices in zip(budgets, assign(costs, sizes, budgets), strict=True):
        cost, size = costs[slots, choices].sum(), sizes[slots, choices].sum()
        assert size <= budget
        assert abs(cost - _best(costs, sizes, budget)[0]) <= SUM_TOLERANCE


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_budget_is_never_exceeded_and_more_never_costs_more(seed, share):
    rng = np.random.default_rng(seed)
    costs = rng.exponential(size=(12, 6))
    sizes = rng.integers(1, 200, (12, 6)) * 17
    least, most = sizes.min(axis=1).sum(), sizes.max(axis=1).sum()
    budget = int(least + share * (most - least))
    slots = np.arange(12)
    small, large = (costs[slots, c].sum() for c in assign(costs, sizes, [budget, 10**9]))
    assert sizes[slots, assign(costs, sizes, [budget])[0]].sum() <= budget
    assert large <= small and np.isclose(large, costs.min(axis=1).sum())


def test_equal_costs_take_the_fewest_bytes():
    assert assign([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[8, 4, 2], [3, 5, 1]], [99])[0].tolist() == [
        2,
        2,
    ]


@pytest.mark.parametrize("costs", [[[np.nan]], [[np.inf]], [1.0]])
def test_costs_that_are_none(costs):
    with pytest.raises(ValueError, match="cost"):
        assign(np.array(costs), np.ones_like(np.array(costs)), [5])


def test_a_budget_below_the_smallest_is_named():
    with pytest.raises(InputError, match="budget of 5 bytes"):
        assign([[1.0, 2.0]] * 3, [[4, 2]] * 3, [7, 5])


def _isotonic(values):
    """Least squares under falling order, by its min-max formula."""
    n = len(values)
    return [
        min(max(np.mean(values[i : j + 1]) for j in range(k, n)) for i in range(k + 1))
        for k in range(n)
    ]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_costs_fall_with_the_size(row, random):
    sizes = list(range(1, len(row) + 1))
    found = monotone(np.array([row]), np.array([sizes]))[0]
    # The formula wants the order along which values may only fall, which is that of the sizes.
    np.testing.assert_allclose(found, _isotonic(np.array(row)), atol=1e-9)
    order = list(range(len(row)))
    random.shuffle(order)
    shuffled = monotone(np.array([row])[:, order], np.array([sizes])[:, order])[0]
    np.testing.assert_allclose(shuffled, found[order], atol=1e-12)


def test_costs_that_fall_already_are_kept_to_the_bit():
    costs = np.array([[0.1, 0.3, np.inf, 0.7]])
    assert (monotone(costs, np.array([[8, 6, 4, 2]])) == costs).all()
