"""The table of named settings on README's first screen, from the records of quality_table.py."""

from __future__ import annotations

from mlx_turbokv.policy import Policy, load_policy
from mlx_turbokv.policy.settings import DEFAULT, SETTINGS

from . import ROOT, read, table, tables
from .tables import NAMES, NONE, Row, main_rows

# what the settings promise: each is the cheapest pair measured on all models whose KLD, with its
# 95 % interval, is at most this
LIMITS = {"near-lossless": 0.001, "balanced": 0.01, "compact": 0.05}


def settings() -> str:
    """The named settings with each model's KLD at 2,048 tokens and needles; empty if none is."""
    found = {name: r for name, r in tables.records().items() if "2048" in r["tables"]}
    if not found:
        return ""
    needles = [needles_of(name) for name in found]
    rows = []
    for policy, name, config in named():
        measured = [row_of(record, f"{config}+{policy.protection}") for record in found.values()]
        bits = [_from_to([row[key] for row in measured if row]) for key in ("bits", "bits_32k")]
        kld = [f"{row['kld']['mean']:.4f}" if row else NONE for row in measured]
        hits = [by_config.get(f"{config}+{policy.protection}", NONE) for by_config in needles]
        named_so = f"`{policy.name}`{' (default)' if policy.name == DEFAULT else ''}"
        rows.append([named_so, name, *bits, *kld, ", ".join(hits)])
    names = [f"KLD: {NAMES[name]}" if i == 0 else NAMES[name] for i, name in enumerate(found)]
    return table(
        ["`--policy`", "K/V", "bits at 2,048", "at 32K", *names, "needles, of f16's"], rows
    )


def _from_to(values: list[float]) -> str:
    shown = dict.fromkeys(f"{x:.1f}" for x in (min(values), max(values))) if values else [NONE]
    return " to ".join(shown)


def row_of(record: dict, config: str) -> Row | None:
    """A configuration's row at 2,048 tokens; None where it was not measured."""
    rows = main_rows(record["tables"]["2048"])
    return next((row for row in rows if row["config"] == config), None)


def needles_of(name: str) -> dict[str, str]:
    """Needles found of those that f16 finds, by configuration, of a quality record's model."""
    name = name.replace("quality", "needle")
    if not (ROOT / f"benchmarks/{name}.json").is_file():
        return {}
    return {
        row["config"]: f"{row['found_of_reference']}/{row['reference_found']}"
        for row in read(name)["summary"]
    }


def named() -> list[tuple[Policy, str, str]]:
    """The settings that have a name: what they hold, and how the records call them."""
    found: list[tuple[Policy, str, str]] = []
    for setting in SETTINGS.values():
        pair = f"{setting.k}/{setting.v}"
        found.append((setting, pair, pair))
    return [*found, (load_policy("la-v7"), "the paper's", "la-v7")]
