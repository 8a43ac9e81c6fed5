"""The paper's claims, and what measurements say of them.

A claim says that one configuration has a smaller loss than another. Windows are paired: each gives
one difference, and the 95 % interval of the mean is a bootstrap over windows, or of fewer than
FEWEST, of which a bootstrap is too narrow, Student's. A claim holds if the interval lies on its
side, does not hold if it lies on the other, and else cannot be told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from few_windows import FEWEST, STUDENT, interval_of
from paper_keys import gaps
from paper_roles import K_BITS, RAW, UNPROTECTED

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "cannot tell", "not measured"
TURBO2_COST = (0.03, 0.05)  # "+3-5 % PPL" against q8_0/q8_0
WITHIN = (-math.inf, 0.01)  # "within 1 % of q8_0"
SEED, SAMPLES = 20250101, 4000
Results = dict[str, dict]  # rows by role


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
# of its later findings, on a mixture of experts
ADDENDUM_CLAIMS = (
    Claim(
        "Boundary V matches or slightly exceeds uniform turbo3 (found on a 35B MoE)",
        "la-v7",
        "turbo3",
    ),
)
K_CLAIMS = tuple(
    Claim(f"K in q8_0 helps more in boundary layers than in as many middle ones, turbo{bits} else",
          f"K {bits}, boundary", f"K {bits}, middle")
    for bits in K_BITS
)  # fmt: skip
DILUTED = {"la-v7": "Boundary V", "4+4": "4+4"}


def verdict(interval: tuple[float, float] | None, low: float = 0.0, high: float = math.inf) -> str:
    """Whether an interval lies within [low, high], outside of it, or across an end."""
    if interval is None:
        return OPEN
    if low < interval[0] and interval[1] < high:
        return HOLDS
    return FAILS if interval[1] < low or interval[0] > high else OPEN


def losses(row: dict, key: str = "nll") -> np.ndarray:
    """A row's values by window: the divergence ("kld"), or the loss ("nll").

    The loss is that over f16's where a record has no other: differences of rows are the same.
    """
    name = f"{key}_by_window"
    return np.array(row[name] if name in row else row[f"delta_{name}"], np.float64)


def by_window(results: Results, roles: tuple[str, ...], key: str = "nll"):
    """Values of the roles by window ("nll" or "kld"); None if a role was not measured."""
    if any(role not in results for role in roles):
        return None
    return [losses(results[role], key) for role in roles]


def judge(claim: Claim, results: Results, key: str = "nll") -> dict:
    """The verdict on a claim by loss ("nll") or by divergence from f16 ("kld")."""
    found = by_window(results, (claim.higher, claim.lower), key)
    return {"verdict": MISSING} if found is None else of_differences(found[0] - found[1])


def of_differences(values: np.ndarray) -> dict:
    """The verdict on values by window that should be above zero."""
    interval = interval_of(values)
    return {"difference": float(values.mean()), "interval": interval, "verdict": verdict(interval)}


def perplexity_cost(results: Results, role: str, low: float, high: float) -> dict:
    """What a role adds to the perplexity of q8_0/q8_0, against a range of the paper's."""
    found = by_window(results, (role, "q8"))
    if found is None:
        return {"verdict": MISSING}
    interval = interval_of(found[0] - found[1])
    interval = interval and (math.expm1(interval[0]), math.expm1(interval[1]))
    difference = math.expm1(float((found[0] - found[1]).mean()))
    return {
        "difference": difference, "interval": interval, "verdict": verdict(interval, low, high),
    }  # fmt: skip


def gap_closed(results: Results, role: str = "la-v7") -> dict | None:
    """Share of the way from turbo2 to turbo3 that a role goes, with a bootstrap interval.

    The interval is None where resampled windows do not agree that turbo3 is better.
    """
    found = by_window(results, ("turbo2", role, "turbo3"))
    if found is None:
        return None
    gap, gained = found[0] - found[2], found[0] - found[1]
    record = {"share": float(gained.mean() / gap.mean()), "interval": None}
    if gap.size > 1:
        draws = np.random.default_rng(SEED).integers(0, gap.size, (SAMPLES, gap.size))
        all_gaps, gains = gap[draws].mean(1), gained[draws].mean(1)
        if np.quantile(all_gaps, 0.025) > 0:
            low, high = np.quantile(gains / all_gaps, [0.025, 0.975])
            record["interval"] = float(low), float(high)
    return record


def dilution(short: Results, long: Results, role: str = "la-v7") -> dict:
    """Whether a role's gain over turbo2 is smaller at long context; windows are not paired."""
    pairs = [by_window(results, ("turbo2", role)) for results in (short, long)]
    if any(pair is None for pair in pairs):
        return {"verdict": MISSING}
    gains = [turbo2 - boundary for turbo2, boundary in pairs]
    difference = float(gains[0].mean() - gains[1].mean())
    if min(g.size for g in gains) < 2:
        return {"verdict": OPEN, "difference": difference}
    if (fewest := min(g.size for g in gains)) < FEWEST:
        reach = STUDENT[fewest] * math.sqrt(sum(g.var(ddof=1) / g.size for g in gains))
        interval = difference - reach, difference + reach
        return {"difference": difference, "interval": interval, "verdict": verdict(interval)}
    rng = np.random.default_rng(SEED)
    means = [g[rng.integers(0, g.size, (SAMPLES, g.size))].mean(1) for g in gains]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    interval = float(low), float(high)
    return {"difference": difference, "interval": interval, "verdict": verdict(interval)}


def retrieval(needle: dict, name: str) -> dict:
    """Whether a configuration impairs retrieval: what f16 finds is lost, or less probable."""
    rows = {r["config"].removesuffix(UNPROTECTED): r for r in needle["summary"]}
    row = rows.get(name.removesuffix(UNPROTECTED)) or rows.get("la-v7")
    if row is None:
        return {"verdict": MISSING}
    delta, of = row["delta_logp"], row["reference_found"]
    found = {"difference": delta["mean"], "interval": delta["interval"], "of": of}
    # what is no less probable than with f16 is not impaired
    return found | {
        "lost": of - row["found_of_reference"], "verdict": verdict(delta["interval"]),
    }  # fmt: skip


def growth(results: Results, more: int, fewer: int) -> dict:
    """Whether boundary layers gain more over middle ones with fewer bits of K, by KLD."""
    roles = [f"K {bits}, {where}" for bits in (fewer, more) for where in ("middle", "boundary")]
    found = by_window(results, tuple(roles), "kld")
    if found is None:
        return {"verdict": MISSING}
    return of_differences((found[0] - found[1]) - (found[2] - found[3]))


def judged(tables: dict[int, Results], needle: dict | None, keys: dict | None) -> list[dict]:
    """Every claim with its verdicts; ``where`` is a window's tokens or another measurement.

    Args:
        tables: rows by role, for each length of windows.
        keys: what paper_keys.py measured.
    """
    found = []

    def add(text: str, where: str, unit: str, result: dict, **more: dict) -> None:
        found.append({"claim": text, "where": where, "unit": unit, **result, **more})

    for n, results in sorted(tables.items()):
        wanted = CLAIMS + (HYBRID_CLAIMS if any(role in results for role in RAW) else ())
        wanted += ADDENDUM_CLAIMS
        wanted += K_CLAIMS if any(claim.lower in results for claim in K_CLAIMS) else ()
        for claim in wanted:
            by_kld = judge(claim, results, "kld")
            add(claim.text, f"{n:,}", "nats", judge(claim, results), by_kld=by_kld)
        cost = perplexity_cost(results, "turbo2", *TURBO2_COST)
        add("turbo2 for V costs 3 to 5 % of PPL", f"{n:,}", "PPL", cost)
        cost = perplexity_cost(results, "la-v7", *WITHIN)
        add("Boundary V is within 1 % of q8_0's PPL", f"{n:,}", "PPL", cost)
        if K_CLAIMS[0].lower in results:
            for more, fewer in zip(K_BITS, K_BITS[1:]):
                text = f"that grows with fewer bits of K: turbo{fewer} against turbo{more}"
                add(text, f"{n:,}", "nats of KLD", growth(results, more, fewer))
    shortest = min(tables, default=0)
    for n in sorted(tables)[1:]:
        for role, name in DILUTED.items():
            text = f"the gain of {name} over turbo2 shrinks with the context"
            result = dilution(tables[shortest], tables[n], role)
            add(text, f"{shortest:,} to {n:,}", "nats", result)
    if needle is not None:
        row = tables.get(shortest, {}).get("la-v7")
        result = retrieval(needle, "la-v7" if row is None else row["config"])
        add("Boundary V does not impair retrieval", "needle", "nats of the answer", result)
    if keys is not None:
        gap = gaps(keys)
        for more, fewer in zip(K_BITS, K_BITS[1:]):
            text = (f"boundary layers' scores suffer more than middle ones', and the more so the "
                    f"fewer bits K has: turbo{fewer} against turbo{more}")  # fmt: skip
            result = {"verdict": MISSING}
            if more in gap and fewer in gap:
                result = of_differences(gap[more] - gap[fewer])
                suffer = of_differences(-gap[fewer])["verdict"]
                result["verdict"] = min(result["verdict"], suffer, key=(FAILS, OPEN, HOLDS).index)
            add(text, "scores", "cosine", result)
    return found
