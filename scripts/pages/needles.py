"""Pages on needles: what is found of facts hidden in long texts."""

from __future__ import annotations

from mlx_turbokv.evaluate.tables import needle_table

from . import ROOT, read, source
from .tables import NAMES

FOUND_SHARE = 0.9  # of what f16 finds: what is called finding as much


def needle() -> str:
    """What is still found, f16 first."""
    record = read("needle")
    shown = needle_table(record)
    parts = ["# Needles", "[Protocol](../evaluation.md#needle).",
             shown.heading.splitlines()[0] + ".", shown.markdown(),
             "\n".join(shown.notes)]  # fmt: skip
    if record["not_measured"]:
        left, n = record["not_measured"], len(record["cases"])
        parts.append(f"{left} of {n + left} cases were left when the time was over.")
    return "\n\n".join([*parts, source("needle")])


def needle_protected() -> str:
    """What is still found by body bits, with protected tokens."""
    parts = [
        "# Needles with protected tokens",
        "[Protocol](../evaluation.md#needle). A needle is an old token, which protection does not "
        "reach: it is read in the layer's format. +32,128: the first 32 and the newest 128 tokens "
        "or more are protected; bits per value count them at these lengths. One needle more or "
        "less of so few says little.",
    ]
    for quality, model in NAMES.items():
        name = quality.replace("quality", "needle")
        if not (ROOT / f"benchmarks/{name}.json").is_file():
            continue
        record = read(name)
        record["model"]["name"] = model
        shown = needle_table(record)
        parts += [f"## {model}", _found_from(record),
                  shown.heading.splitlines()[0] + ".", shown.markdown(),
                  "\n".join(shown.notes), source(name)]  # fmt: skip
    return "\n\n".join(parts)


def _found_from(record: dict) -> str:
    """From which bits on the model finds what it finds with f16."""
    rows = [row for row in record["summary"][1:] if row["protected"] and row["config"][0] == "t"]
    rows.sort(key=lambda row: row["bits_per_value"])
    shares = [row["found_of_reference"] / max(1, row["reference_found"]) for row in rows]
    n = rows[0]["reference_found"]
    for i, row in enumerate(rows):
        if min(shares[i:]) >= FOUND_SHARE:
            name = row["config"].partition("+")[0]
            return (
                f"Of the {n} needles that f16 finds, {name} and all larger pairs with protected "
                f"tokens find at least {FOUND_SHARE:.0%}."
            )
    return f"No pair finds {FOUND_SHARE:.0%} of the {n} needles that f16 finds."
