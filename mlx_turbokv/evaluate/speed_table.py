"""Speed records as tables for a terminal and in Markdown."""

from __future__ import annotations

from .table import bytes_text, centring_notes

HEADER = (
    "tokens", "K/V", "bits/value", "prompt tok/s", "of first", "generation tok/s", "of first",
    "Python ms/step", "peak above weights", "KV bytes",
)  # fmt: skip


def cells(rows: list[dict]) -> list[list[str]]:
    """One line a row; a context that was filled without the model has no prompt speed."""
    return [_cells(row) for row in rows]


def _cells(row: dict) -> list[str]:
    bits = row["bits_per_value"]
    head = [f"{row['tokens']:,}", row["config"], "?" if bits is None else f"{bits:.3f}"]
    if "error" in row:
        return [*head, f"failed: {row['error']}", *[""] * (len(HEADER) - 4)]
    prompt = ["–", "–"]
    if "prompt_tps" in row:
        prompt = [_speed(row["prompt_tps"]), _ratio(row["prompt_of_first"])]
    return [
        *head,
        *prompt,
        _speed(row["generation_tps"]),
        _ratio(row["generation_of_first"]),
        f"{row['build_ms']:.2f}",
        bytes_text(row["peak_bytes_above_weights"]),
        bytes_text(row["kv_bytes"]),
    ]


def _speed(spread: dict) -> str:
    low, high, middle = spread["min"], spread["max"], spread["median"]
    around = 100 * max(high - middle, middle - low) / middle
    return f"{middle:.1f} ±{around:.0f} %"


def _ratio(ratio: float | None) -> str:
    return "?" if ratio is None else f"{ratio:.2f}×"


def as_text(rows: list[dict]) -> str:
    """Aligned columns."""
    return align([list(HEADER), *cells(rows)], left=(1,))


def align(lines: list[list[str]], left: tuple[int, ...]) -> str:
    """Lines of cells in columns, numbers to the right and the columns of ``left`` to the left.

    A line's last cell that is not empty may be longer than its column where only empty ones follow.
    """
    filled = [max((i for i, cell in enumerate(line) if cell), default=0) for line in lines]
    widths = [
        max(len(line[i]) for line, last in zip(lines, filled) if i < last or last == len(line) - 1)
        for i in range(len(lines[0]))
    ]
    out = []
    for line in lines:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ]
        out.append("  ".join(padded).rstrip())
    return "\n".join(out)


def as_markdown(rows: list[dict]) -> str:
    """A Markdown table."""
    lines = [HEADER, ["---:", "---", *["---:"] * (len(HEADER) - 2)], *cells(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def heading(record: dict) -> str:
    """What was run, in two lines."""
    environment = record["environment"]
    return (
        f"{record['model']['name']}, {record['weights']}; {record['generation_tokens']} tokens "
        f"generated, {record['num_trials']} trials a row, configurations in turn\n"
        f"back-end {record['backend']}, mlx {environment['mlx']}, mlx-lm {environment['mlx_lm']}, "
        f"mlx_turbokv {environment['mlx_turbokv']}, {environment['device']}"
    )


def footnotes(record: dict) -> str:
    """How to read the columns."""
    lines = [
        f"Medians, and the farthest trial from it; 'of first' is against "
        f"{record['configs'][0]}, trial by trial, and more is faster."
    ]
    if any(row["kind"] == "context" for row in record["rows"]):
        lines.append(
            "Rows without a prompt speed: the cache was filled with random K and V, packed by the "
            "cache itself, without running the model; its memory is that of generation alone."
        )
    lines += centring_notes(record.get("centred", {}))
    return "\n".join(lines)
