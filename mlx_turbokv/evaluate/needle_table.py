"""Needle records as tables for a terminal and in Markdown."""

from __future__ import annotations

from .speed_table import align
from .table import centring_notes

HEADER = ("K/V", "bits/value", "found", "of what f16 finds", "Δ log p of the answer")


def cells(summary: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(header, one line a configuration), with what was found at each context at the end."""
    contexts = [row["context"] for row in summary[0]["by_context"]] if summary else []
    header = [*HEADER, *(f"at {n:,}" for n in contexts)]
    return header, [_cells(row, i == 0) for i, row in enumerate(summary)]


def _cells(row: dict, is_reference: bool) -> list[str]:
    bits, delta = row["bits_per_value"], row["delta_logp"]
    line = [row["config"], "?" if bits is None else f"{bits:.3f}", f"{row['found']}/{row['n']}"]
    if is_reference:
        line += ["–", "–"]
    else:
        line.append(f"{row['found_of_reference']}/{row['reference_found']}")
        error = "" if delta["se"] is None else f" ± {delta['se']:.3f}"
        line.append(f"{delta['mean']:+.3f}{error}")
    return [*line, *(f"{part['found']}/{part['n']}" for part in row["by_context"])]


def as_text(summary: list[dict]) -> str:
    """Aligned columns."""
    header, lines = cells(summary)
    return align([header, *lines], left=(0,))


def as_markdown(summary: list[dict]) -> str:
    """A Markdown table."""
    header, lines = cells(summary)
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def heading(record: dict) -> str:
    """What was run, in two lines."""
    environment, text = record["environment"], record["text"]
    kinds, n = ", ".join(record["kinds"]), len(record["depths"])
    depths = "1 depth" if n == 1 else f"{n} depths"
    return (
        f"{record['model']['name']}, needles in {text['name']} (sha256 {text['sha256'][:12]}…): "
        f"{len(record['cases'])} cases ({kinds}; {depths})\n"
        f"back-end {record['backend']}, mlx {environment['mlx']}, mlx-lm {environment['mlx_lm']}, "
        f"mlx_turbokv {environment['mlx_turbokv']}, {environment['device']}"
    )


def footnotes(record: dict) -> str:
    """How to read the columns."""
    lines = [
        f"Found: the greedy answer is exactly the needle. Δ log p: log-probability of the right "
        f"answer, in nats, against {record['summary'][0]['config']}, case by case, ± one standard "
        "error over cases."
    ]
    lines += centring_notes({row["config"]: row.get("centred") for row in record["summary"]})
    return "\n".join(lines)
