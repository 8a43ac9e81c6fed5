"""Figures of the architectures: what of their caches is compressed."""

from __future__ import annotations

from . import figure, read


@figure
def models() -> dict[str, str]:
    """The table of every architecture, and what the prose around it names."""
    record = read("models")
    lines = [
        "| architecture | caches | compressed | with --compress-sliding | left alone, and why | "
        "remark |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        added = row["added_with_sliding"]
        cells = [
            row["architecture"],
            row["caches"],
            row["compressed"],
            f"+{added}" if added else "",
        ]
        cells += ["; ".join(row["left_alone"]), row["remark"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return {
        "table": "\n".join(lines),
        "mlx_lm": record["mlx_lm"],
        "helpers": ", ".join(record["helpers"]),
    }
