"""Intervals of means over few windows, of which a bootstrap is too narrow: Student's."""

from __future__ import annotations

import math

import numpy as np

from mlx_turbokv.evaluate.statistics import bootstrap_interval

FEWEST = 8  # windows of a bootstrap
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447}  # 97.5 %, by windows
NOTE = (
    f"Intervals: bootstrap over windows; of fewer than {FEWEST} windows Student's, since such a "
    "bootstrap is too narrow."
)


def interval_of(values: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of a mean over windows; None when fewer than two."""
    if values.size not in STUDENT:
        return bootstrap_interval(values)
    reach = STUDENT[values.size] * values.std(ddof=1) / math.sqrt(values.size)
    return float(values.mean() - reach), float(values.mean() + reach)
