"""Means over windows, with standard errors and bootstrap intervals.

Tokens of one window share a text and a cache, so they are not independent: the errors here treat
windows as the unit (blocks of equal length), and the bootstrap resamples windows. Differences
between configurations are taken per window first, so what the windows have in common cancels.
"""

from __future__ import annotations

import numpy as np

BOOTSTRAP_SAMPLES = 2000
BOOTSTRAP_SEED = 20250101
LEVEL = 0.95  # of every interval
MARKS = {
    "min": 0, "p01": 1, "p05": 5, "p10": 10, "median": 50,
    "p90": 90, "p95": 95, "p99": 99, "p99.9": 99.9, "max": 100,
}  # fmt: skip
# Percentiles with intervals: a bootstrap says nothing of the extremes.
INTERVALS = {name: MARKS[name] for name in ("median", "p90", "p95", "p99", "p99.9")}


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of independent values; None when fewer than two."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return None
    return float(np.std(values, ddof=1) / np.sqrt(values.size))


def mean_and_error(values: np.ndarray) -> dict:
    """`{"mean": …, "se": …}` of independent values."""
    return {"mean": float(np.mean(np.asarray(values, np.float64))), "se": standard_error(values)}


def mean_with_interval(values: np.ndarray) -> dict:
    """The same with the bootstrap interval."""
    return mean_and_error(values) | {"interval": bootstrap_interval(values)}


def bootstrap_interval(
    window_means: np.ndarray, samples: int = BOOTSTRAP_SAMPLES
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over windows; None when fewer than two.

    The seed is fixed: the same results give the same interval.
    """
    values = np.asarray(window_means, np.float64)
    if values.size < 2:
        return None
    return _interval(values[_resampled(values.size, samples)].mean(axis=1))


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The middle ``LEVEL`` of bootstrap values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def block_summary(windows: list[np.ndarray]) -> dict:
    """Mean of per-token values given window by window, with its errors.

    Returns `mean`; `se`, over windows (over tokens if there is only one window: `se_over` says
    which); `se_tokens`; and `interval`, the 95 % bootstrap interval over windows.
    """
    tokens = np.concatenate(windows).astype(np.float64)
    means = np.array([np.mean(w, dtype=np.float64) for w in windows])
    se, over = standard_error(means), "windows"
    se_tokens = standard_error(tokens)
    if se is None:
        se, over = se_tokens, "tokens"
    return {
        "mean": float(tokens.mean()),
        "se": se,
        "se_over": over,
        "se_tokens": se_tokens,
        "interval": bootstrap_interval(means),
    }


def perplexity(nll: list[np.ndarray]) -> dict:
    """exp of the mean loss, with llama-perplexity's standard error (tokens as the unit).

    `interval` is the bootstrap's over windows, through the exponential.
    """
    summary = block_summary(nll)
    ppl = float(np.exp(summary["mean"]))
    interval = summary["interval"]
    return {
        "ppl": ppl,
        "se": None if summary["se_tokens"] is None else ppl * summary["se_tokens"],
        "interval": interval and tuple(float(np.exp(x)) for x in interval),
    }


def rms(windows: list[np.ndarray]) -> dict:
    """Root mean square of per-token values given window by window, with its interval."""
    squares = [np.square(w, dtype=np.float64) for w in windows]
    interval = bootstrap_interval(np.array([np.mean(x) for x in squares]))
    return {
        "rms": float(np.sqrt(np.mean(np.concatenate(squares)))),
        "rms_interval": interval and tuple(float(np.sqrt(x)) for x in interval),
    }


def percentiles(values: np.ndarray) -> dict:
    """The percentiles that llama-perplexity prints for KLD, and the extremes."""
    found = np.percentile(np.asarray(values, np.float64), list(MARKS.values()))
    return {name: float(x) for name, x in zip(MARKS, found)}


def by_position(windows: list[np.ndarray], first: int, n_buckets: int = 8) -> list[dict]:
    """Means over buckets of positions, the same positions of every window taken together.

    `first` is the position in the window that the first value predicts from.
    """
    stacked = np.stack(windows).astype(np.float64)
    edges = np.linspace(0, stacked.shape[1], n_buckets + 1).round().astype(int)
    return [
        {
            "positions": [int(first + a), int(first + b)],
            "mean": float(stacked[:, a:b].mean()),
            "se": standard_error(stacked[:, a:b].mean(axis=1)),
        }
        for a, b in zip(edges[:-1], edges[1:])
        if b > a
    ]


def ratio(a: np.ndarray, b: np.ndarray) -> dict:
    """Ratio of two means over the same windows, with a paired bootstrap interval.

    Each resample takes the same windows of both, so what they have in common cancels.

    Args:
        a, b: means of each window, in the same order.

    Returns `mean`, None where b's mean is zero, and `interval`, None with fewer than two windows.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} windows cannot be paired")
    if b.mean() == 0:
        return {"mean": None, "interval": None}
    found = {"mean": float(a.mean() / b.mean()), "interval": None}
    if a.size > 1:
        drawn = _resampled(a.size)
        found["interval"] = _interval(a[drawn].mean(axis=1) / b[drawn].mean(axis=1))
    return found


def _resampled(n: int, samples: int = BOOTSTRAP_SAMPLES) -> np.ndarray:
    """Windows of each bootstrap sample, [samples, n]."""
    return np.random.default_rng(BOOTSTRAP_SEED).integers(0, n, size=(samples, n))


def percentile_intervals(
    windows: list[np.ndarray], marks: dict[str, float] = INTERVALS
) -> dict[str, tuple[float, float]] | None:
    """Bootstrap intervals over windows of percentiles of all tokens; None with fewer than two.

    Args:
        marks: percent by name.
    """
    if len(windows) < 2:
        return None
    values = np.concatenate(windows).astype(np.float64)
    owner = np.repeat(np.arange(len(windows)), [w.size for w in windows])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    found = []
    for drawn in _resampled(len(windows)):
        # A window that was drawn twice counts its tokens twice.
        rank = np.cumsum(np.bincount(drawn, minlength=len(windows))[owner])
        at = np.searchsorted(rank, np.array(list(marks.values())) / 100 * rank[-1])
        found.append(values[np.minimum(at, values.size - 1)])
    return dict(zip(marks, map(_interval, np.transpose(found))))
