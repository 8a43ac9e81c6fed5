"""The oracle of q8_0: teacher-forced codes are taken at ties, and nowhere else."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from q8_simulation import TIE, through_q8

ROWS = mx.array(np.random.default_rng(0).standard_normal((1, 2, 500, 80)).astype(np.float32))


def test_another_runs_ties_are_taken() -> None:
    """The other run's rows differ by rounding, as those of a later layer do."""
    noise = 1e-6 * np.random.default_rng(1).standard_normal(ROWS.shape).astype(np.float32)
    stored, own = through_q8(ROWS + mx.array(noise)), through_q8(ROWS)
    assert 0 < mx.sum(stored != own).item() < 1e-2 * own.size
    assert mx.array_equal(through_q8(ROWS, stored), stored).item()


def test_a_wrong_code_is_not_taken() -> None:
    own = np.array(through_q8(ROWS))
    step = np.array(mx.max(mx.abs(ROWS), -1, keepdims=True)) / 127
    towards = np.where(np.array(ROWS) > own, step, -step)
    inside = np.abs(own) < 0.9 * np.abs(own).max(-1, keepdims=True)  # the largest sets the scale
    forced = np.array(through_q8(ROWS, mx.array(own + inside * towards)))
    taken = np.abs(forced - own) > 0.5 * step
    assert taken.mean() < 2 * TIE


def test_a_wrong_scale_is_not_taken() -> None:
    own = through_q8(ROWS)
    forced = through_q8(ROWS, own * (1 + 2**-9))
    assert mx.mean(forced != own).item() < 2 * TIE
