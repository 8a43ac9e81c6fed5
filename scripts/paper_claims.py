"""The paper's claims as comparisons that windows of a text can settle, or leave open.

A comparison is paired: each window gives one difference, and the 95 % interval of their mean is a
bootstrap over windows. A claim holds if the interval lies wholly on its side, does not hold if it
lies wholly on the other, and otherwise cannot be told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlx_turbokv.evaluate.statistics import bootstrap_interval

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "cannot tell", "not measured"
SEED, SAMPLES = 20250101, 4000


@dataclass(frozen=True)
class Claim:
    """``lower`` has a smaller loss than ``higher``, by the paper; ``text`` is what it says."""

    text: str
    lower: str
    higher: str


CLAIMS = (
    Claim("Boundary V (LA-V7) is better than uniform turbo2", "la-v7", "turbo2"),
    Claim("uniform turbo3 is better than Boundary V", "turbo3", "la-v7"),
    Claim("LA-V6 (the last 8 layers) is worse than LA-V7 (first 2 and last 2)", "la-v7", "la-v6"),
    Claim("LA-V7 (q8_0 boundaries) is better than LA-V5 (turbo4), on sensitive models",
          "la-v7", "la-v5"),
    Claim("f16 boundaries are no better than q8_0 ones (2+2)", "la-v7", "f16 2+2"),
    Claim("f16 boundaries are no better than q8_0 ones (4+4)", "4+4", "f16 4+4"),
    Claim("4+4 is better than 2+2 on pure attention", "4+4", "la-v7"),
    Claim("K is worth more bits than V: turbo3 for V costs less than turbo3 for K",
          "turbo3", "swapped"),
)  # fmt: skip
HYBRID_CLAIMS = (
    Claim("boundaries counted over KV layers beat raw layer indices (2+2)", "la-v7", "raw 2+2"),
    Claim("boundaries counted over KV layers beat raw layer indices (4+4)", "4+4", "raw 4+4"),
)
TURBO2_COST = (0.03, 0.05)  # "+3-5 % PPL" against q8_0/q8_0


def by_window(results: dict[str, dict], role: str, key: str) -> np.ndarray | None:
    """A role's values by window: ``key`` is "nll" or "kld"."""
    row = results.get(role)
    return None if row is None else np.array(row[f"{key}_by_window"], np.float64)


def judge(claim: Claim, results: dict[str, dict], key: str = "nll") -> dict:
    """The verdict on a claim by loss ("nll") or by divergence from f16 ("kld").

    Args:
        results: rows of a perplexity record, by role.
    """
    higher, lower = (by_window(results, role, key) for role in (claim.higher, claim.lower))
    if higher is None or lower is None:
        return {"verdict": MISSING}
    difference = higher - lower
    interval = bootstrap_interval(difference)
    return {
        "difference": float(difference.mean()),
        "interval": interval,
        "verdict": verdict(interval, 0.0, math.inf),
    }


def verdict(interval: tuple[float, float] | None, low: float, high: float) -> str:
    """Whether an interval lies within [low, high], outside of it, or across an end."""
    if interval is None:
        return OPEN
    if low < interval[0] and interval[1] < high:
        return HOLDS
    if interval[1] < low or interval[0] > high:
        return FAILS
    return OPEN


def turbo2_cost(results: dict[str, dict]) -> dict:
    """What turbo2 adds to the perplexity of q8_0/q8_0, against the paper's 3 to 5 %."""
    turbo2, q8 = (by_window(results, role, "nll") for role in ("turbo2", "q8"))
    if turbo2 is None or q8 is None:
        return {"verdict": MISSING}
    difference = turbo2 - q8
    interval = bootstrap_interval(difference)
    as_ppl = interval and tuple(math.expm1(x) for x in interval)
    return {
        "difference": math.expm1(float(difference.mean())),
        "interval": as_ppl,
        "verdict": verdict(as_ppl, *TURBO2_COST),
    }


def gap_closed(results: dict[str, dict], role: str = "la-v7", key: str = "nll") -> dict | None:
    """Share of the way from turbo2 to turbo3 that a role goes, with a bootstrap interval.

    The interval is None where resampled windows do not even agree that turbo3 is better.
    """
    found = [by_window(results, name, key) for name in ("turbo2", role, "turbo3")]
    if any(x is None for x in found):
        return None
    turbo2, this, turbo3 = found
    gap, gained = turbo2 - turbo3, turbo2 - this
    record = {"share": float(gained.mean() / gap.mean()), "interval": None}
    if gap.size > 1:
        draws = np.random.default_rng(SEED).integers(0, gap.size, (SAMPLES, gap.size))
        gaps, gains = gap[draws].mean(1), gained[draws].mean(1)
        if np.quantile(gaps, 0.025) > 0:
            low, high = np.quantile(gains / gaps, [0.025, 0.975])
            record["interval"] = float(low), float(high)
    return record


def dilution(short: dict[str, dict], long: dict[str, dict]) -> dict:
    """Whether Boundary V's gain over turbo2 is smaller at long context; windows are not paired."""
    gains = []
    for results in (short, long):
        turbo2, boundary = (by_window(results, role, "nll") for role in ("turbo2", "la-v7"))
        if turbo2 is None or boundary is None:
            return {"verdict": MISSING}
        gains.append(turbo2 - boundary)
    if min(g.size for g in gains) < 2:
        return {"verdict": OPEN, "difference": float(gains[0].mean() - gains[1].mean())}
    rng = np.random.default_rng(SEED)
    means = [g[rng.integers(0, g.size, (SAMPLES, g.size))].mean(1) for g in gains]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    interval = float(low), float(high)
    return {
        "difference": float(gains[0].mean() - gains[1].mean()),
        "interval": interval,
        "verdict": verdict(interval, 0.0, math.inf),
    }


def retrieval(needle: dict, name: str) -> dict:
    """Whether a configuration impairs retrieval: what f16 finds is lost, or less probable."""
    row = next((r for r in needle["summary"] if r["config"] == name), None)
    if row is None:
        return {"verdict": MISSING}
    interval = row["delta_logp"]["interval"]
    lost = row["reference_found"] - row["found_of_reference"]
    found = {"difference": row["delta_logp"]["mean"], "interval": interval, "lost": lost,
             "of": row["reference_found"]}  # fmt: skip
    if interval is not None and interval[1] < 0:
        return found | {"verdict": FAILS}
    holds = interval is not None and interval[0] > 0
    return found | {"verdict": HOLDS if holds else OPEN}
