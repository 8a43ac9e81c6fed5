"""Long prompts are begun a layer at a time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_turbokv.attention.pacing import Pace
from mlx_turbokv.kernels import rotate
from mlx_turbokv.quant.rotation import rotation_matrix, rotation_width


@pytest.fixture
def evaluated(monkeypatch):
    """What is begun and what is waited for, in turn."""
    calls = []
    monkeypatch.setattr(mx, "async_eval", lambda x: calls.append(("begun", x)))
    monkeypatch.setattr(mx, "eval", lambda x: calls.append(("waited for", x)))
    return calls


def test_a_call_is_begun_and_the_one_before_is_waited_for(evaluated) -> None:
    pace = Pace(10)
    outputs, held = [mx.zeros(1) for _ in range(3)], [mx.zeros(1) for _ in range(3)]
    for output, rows in zip(outputs, held):
        pace.keep(output, rows, 10)
    assert [what for what, _ in evaluated] == [
        "begun",
        "begun",
        "waited for",
        "begun",
        "waited for",
    ]
    assert [x for what, x in evaluated if what == "begun"] == outputs
    waited = [x for what, x in evaluated if what == "waited for"]
    assert all(x is rows for x, rows in zip(waited, held))


def test_calls_of_few_bytes_and_rows_that_are_gone_are_left(evaluated) -> None:
    pace = Pace(10)
    pace.keep(mx.zeros(1), mx.zeros(1), 9)
    assert evaluated == []
    pace.keep(mx.zeros(1), mx.zeros(1), 10)
    pace.keep(mx.zeros(1), mx.zeros(1), 10)
    assert [what for what, _ in evaluated] == ["begun", "begun"]


def test_within_a_transformation_nothing_is_begun() -> None:
    pace = Pace(0)

    def doubled(x: mx.array) -> mx.array:
        pace.keep(2 * x, x, 1)
        return 2 * x

    assert mx.compile(doubled)(mx.array(3.0)).item() == 6


@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("inverse", [False, True])
def test_half_rows_are_rotated_to_half_precision(head_dim: int, inverse: bool) -> None:
    x = np.random.default_rng(head_dim).standard_normal((1, 2, 40, head_dim)).astype(np.float16)
    width = rotation_width(head_dim)
    matrix = rotation_matrix(width).astype(np.float64)
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, width)
    expected = (groups @ (matrix if inverse else matrix.T)).reshape(x.shape)
    got = rotate.rotate_to(mx.array(x), head_dim, mx.float16, inverse)
    assert got.dtype == mx.float16
    assert np.abs(np.array(got) - expected).max() <= 2**-10 * np.abs(expected).max()
