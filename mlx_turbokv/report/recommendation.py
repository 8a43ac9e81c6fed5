"""Which of the settings measured in a report to take, and why, in a sentence or two."""

from __future__ import annotations

from math import comb

from ..errors import InputError
from ..evaluate.names import is_peer, parse_policy
from ..evaluate.notes import may_protect
from ..evaluate.tables import bytes_text
from ..policy.recommended import options
from .order import cache_bytes, longest

MOST_KLD = 0.01  # nats a token
NOISE = 0.05  # a loss of needles that chance alone would bring more often than that is noise


def recommendation(record: dict) -> str | None:
    """The sentences; None where the report has no KLD.

    The smallest cache is taken whose KLD is at most MOST_KLD and that loses needles no more often
    than chance would, where needles were measured with it.
    """
    if not record.get("perplexity"):
        return None
    rows = [r for r in record["perplexity"]["results"][1:] if not is_peer(r["config"])]
    rows = [row for row in rows if row["bits_per_value"] is not None]
    if not rows:
        return None
    needles = {r["config"]: r for r in (record.get("needle") or {"summary": []})["summary"]}
    good = [
        row for row in rows
        if row["kld"]["mean"] <= MOST_KLD and _finds_as_many(needles.get(row["config"]))
    ]  # fmt: skip
    if not good:
        best = min(rows, key=lambda row: row["kld"]["mean"])
        return (
            f"None of the settings measured here has a KLD of {MOST_KLD:g} or less and finds what "
            f"f16 finds. {best['config']} comes nearest{_typed(best)}. "
            f"{_why(best, needles, record)}."
        )
    sizes = cache_bytes(record)
    taken = min(
        good, key=lambda r: (sizes.get(r["config"], r["bits_per_value"]), r["kld"]["mean"])
    )  # fmt: skip
    return (
        f"Take {taken['config']}{_typed(taken)}: of the settings measured here it has "
        f"the smallest cache with a KLD of {MOST_KLD:g} or less. {_why(taken, needles, record)}."
    )


def _typed(row: dict) -> str:
    """What to type, with the tokens that were protected when it was measured."""
    try:
        policy = parse_policy(row["config"])
    except InputError:
        return ""
    protected = row.get("protected")
    if protected or may_protect(row["config"]):
        sink, recent = (protected or "0,0").split(",")
        policy = policy.protecting(int(sink), int(recent))
    words = options(policy)
    return f" ({words})" if words else ""


def _why(row: dict, needles: dict[str, dict], record: dict) -> str:
    name, part = row["config"], record["perplexity"]
    error = f" ± {row['kld']['se']:.1g}" if row["kld"]["se"] is not None else ""
    said = [
        f"Its KLD is {row['kld']['mean']:.2g}{error} nats a token over {part['n_windows']} "
        f"window{'s' * (part['n_windows'] > 1)} of {part['n_ctx']:,}"
    ]
    if name in needles:
        found = needles[name]
        said.append(f"it finds {found['found_of_reference']} of the {found['reference_found']} "
                    "needles that f16 finds")  # fmt: skip
    else:
        said.append("needles were not measured with it")
    sizes = cache_bytes(record)
    if name in sizes:
        n, first = longest(record), part["results"][0]["config"]
        said.append(f"its cache takes {bytes_text(sizes[name])} of f16's "
                    f"{bytes_text(sizes[first])} at {n:,} tokens")  # fmt: skip
    return ", ".join(said[:-1]) + f", and {said[-1]}"


def _finds_as_many(row: dict | None) -> bool:
    """Whether losses against f16 are noise, by the sign test; True where nothing was measured."""
    if row is None:
        return True
    lost = row["reference_found"] - row["found_of_reference"]
    n = lost + row["found_beyond_reference"]
    return sum(comb(n, k) for k in range(lost, n + 1)) / 2**n > NOISE
