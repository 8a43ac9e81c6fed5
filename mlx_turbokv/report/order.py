"""Configurations of a report in one order, with one colour and by one rule for bytes."""

from __future__ import annotations

from math import inf

from ..evaluate.plots import COLORS


def ordered(record: dict) -> dict:
    """The record with every part's rows by bits, most first; f16, the reference, leads.

    Raises: what a record lacks, of any kind.
    """
    bits = _bits(record)

    def by_bits(rows: list, name: str = "config") -> list:
        rest = sorted(rows[1:], key=lambda row: -bits.get(row[name], inf))
        return [*rows[:1], *rest]

    found = dict(record)
    if part := record.get("perplexity"):
        found["perplexity"] = {**part, "results": by_bits(part["results"])}
    if part := record.get("needle"):
        found["needle"] = {**part, "summary": by_bits(part["summary"])}
    if part := record.get("plan"):
        found["plan"] = {**part, "rows": by_bits(part["rows"], "name")}
    if part := record.get("bench"):
        names = [row["config"] for row in by_bits([{"config": name} for name in part["configs"]])]
        rows = sorted(part["rows"], key=lambda row: (row["tokens"], names.index(row["config"])))
        found["bench"] = {**part, "configs": names, "rows": rows}
    return found


def _bits(record: dict) -> dict[str, float]:
    """Bits per value of every configuration, of the first part that has them."""
    rows = [
        *((row["name"], row["bits"]) for row in (record.get("plan") or {"rows": []})["rows"]),
        *((row["config"], row["bits_per_value"]) for row in _results(record)),
        *((row["config"], row["bits_per_value"])
          for row in (record.get("needle") or {"summary": []})["summary"]),
    ]  # fmt: skip
    found: dict[str, float] = {}
    for name, bits in rows:
        if bits is not None:
            found.setdefault(name, bits)
    return found


def _results(record: dict) -> list[dict]:
    return (record.get("perplexity") or {"results": []})["results"]


def colors(record: dict) -> dict[str, str]:
    """A colour for every configuration, the same in all figures."""
    names = list(dict.fromkeys([
        *(row["config"] for row in _results(record)),
        *(row["name"] for row in (record.get("plan") or {"rows": []})["rows"]),
        *(record.get("bench") or {"configs": []})["configs"],
    ]))  # fmt: skip
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def longest(record: dict) -> int:
    """The longest context of the plan."""
    return max(int(n) for n in record["plan"]["f16_bytes"])


def cache_bytes(record: dict) -> dict[str, float]:
    """Bytes of a sequence's caches at the plan's longest context, as computed; empty without one.

    f16 counts 16 bits a value whatever the model runs in. What is not packed counts in every one.
    """
    plan = record.get("plan")
    if not plan:
        return {}
    n = str(longest(record))
    by_text = {str(k): v for k, v in plan["f16_bytes"].items()}
    alone = {str(k): v for k, v in plan.get("bytes_left_alone", {}).items()}.get(n, 0)
    found = {row["name"]: {str(k): v for k, v in row["bytes"].items()}[n] for row in plan["rows"]}
    for row in _results(record):
        if row["config"] not in found and row["bits_per_value"] is not None:
            # other projects' caches: the same bits at every context
            packed = by_text[n] - alone
            found[row["config"]] = alone + packed * row["bits_per_value"] / 16
    return found
