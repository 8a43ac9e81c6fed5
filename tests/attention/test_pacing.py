"""Attention calls of long prompts wait for the call before them."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_turbokv.attention.pacing import InFlightLimit


@pytest.fixture
def evaluated(monkeypatch):
    """What is started and what is waited for, in order."""
    calls = []
    monkeypatch.setattr(mx, "async_eval", lambda x: calls.append(("started", x)))
    monkeypatch.setattr(mx, "eval", lambda x: calls.append(("waited for", x)))
    return calls


def test_a_call_is_started_and_the_one_before_is_waited_for(evaluated) -> None:
    limit = InFlightLimit(10)
    outputs, held = [mx.zeros(1) for _ in range(3)], [mx.zeros(1) for _ in range(3)]
    for output, rows in zip(outputs, held):
        limit(output, rows, 10)
    assert [what for what, _ in evaluated] == [
        "started",
        "started",
        "waited for",
        "started",
        "waited for",
    ]
    assert [x for what, x in evaluated if what == "started"] == outputs
    waited = [x for what, x in evaluated if what == "waited for"]
    assert all(x is rows for x, rows in zip(waited, held))


def test_calls_of_few_bytes_and_rows_that_are_gone_are_left(evaluated) -> None:
    limit = InFlightLimit(10)
    limit(mx.zeros(1), mx.zeros(1), 9)
    assert evaluated == []
    limit(mx.zeros(1), mx.zeros(1), 10)
    limit(mx.zeros(1), mx.zeros(1), 10)
    assert [what for what, _ in evaluated] == ["started", "started"]


def test_within_a_transformation_nothing_is_started() -> None:
    limit = InFlightLimit(0)

    def doubled(x: mx.array) -> mx.array:
        limit(2 * x, x, 1)
        return 2 * x

    assert mx.compile(doubled)(mx.array(3.0)).item() == 6
