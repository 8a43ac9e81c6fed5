"""The summary of a report: one line a configuration."""

from __future__ import annotations

import math

from ..evaluate import tables
from ..evaluate.notes import protection_notes
from ..evaluate.tables import Table
from . import order


def table_of(record: dict) -> tuple[Table, set[str]]:
    """The table, and the configurations on the Pareto front of bits and KLD."""
    quality = _quality(record)
    found = {r["config"]: r for r in (record.get("needle") or {"summary": []})["summary"]}
    speed, sizes = _longest(record.get("bench")), order.cache_bytes(record)
    header = ["K/V"]
    header += ["bits/value", "KLD", "Δnll", "same top"] if quality else []
    header += ["needles, of f16’s"] if found else []
    header += ["generation, of f16"] if speed else []
    header += [f"cache at {order.longest(record):,} tokens"] if sizes else []
    rows = []
    for name in dict.fromkeys([*quality, *found, *speed]):
        cells = [name]
        if quality:
            cells += _quality_cells(quality.get(name), name == next(iter(quality)))
        if found:
            cells.append(_found_cell(found.get(name)))
        if speed:
            cells.append(_speed_cell(speed.get(name)))
        if sizes:
            cells.append(tables.bytes_text(sizes[name]) if name in sizes else tables.NONE)
        rows.append(cells)
    front, notes = front_of(list(quality.values())[1:]), []
    if front:
        names = ", ".join(n for n in quality if n in front)
        notes.append(f"● Nothing measured here has both fewer bits and a smaller KLD: {names}.")
    of_bench = (record.get("bench") or {}).get("protected") or {}
    protected = {
        name: of_bench.get(name, row.get("protected"))
        for name, row in {**speed, **found, **quality}.items()
    }
    notes += protection_notes(protected)
    if speed:
        tokens = next(iter(speed.values()))["tokens"]
        notes.append(f"Speed is that at {tokens:,} tokens.")
    return Table(header, rows, notes=notes), front


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other undercuts in both coordinates, from left to right."""
    front, best = [], math.inf
    for i in sorted(range(len(points)), key=points.__getitem__):
        if points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front


def front_of(results: list[dict]) -> set[str]:
    """The configurations of a perplexity record on the Pareto front of bits and KLD."""
    rows = [r for r in results if r["bits_per_value"] is not None]
    points = [(r["bits_per_value"], r["kld"]["mean"]) for r in rows]
    return {rows[i]["config"] for i in pareto_front(points)}


def _quality(record: dict) -> dict[str, dict]:
    results = (record.get("perplexity") or {"results": []})["results"]
    return {r["config"]: r for r in results}


def _quality_cells(row: dict | None, is_reference: bool) -> list[str]:
    if row is None:
        return [tables.NONE] * 4
    cells = tables.perplexity_rows([row, row])[0 if is_reference else 1]
    return [cells[1], cells[5], cells[4], cells[8]]


def _found_cell(row: dict | None) -> str:
    return tables.NONE if row is None else f"{row['found_of_reference']}/{row['reference_found']}"


def _speed_cell(row: dict | None) -> str:
    return tables.NONE if row is None else tables.times_text(row["generation_of_first"])


def _longest(bench: dict | None) -> dict[str, dict]:
    """Rows of the longest context, by configuration."""
    rows = [r for r in (bench or {"rows": []})["rows"] if "error" not in r]
    longest = max((r["tokens"] for r in rows), default=0)
    return {r["config"]: r for r in rows if r["tokens"] == longest}
