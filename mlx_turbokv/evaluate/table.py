"""The results table, as aligned text, Markdown or JSON."""

from __future__ import annotations

import json

COLUMNS = (
    "K/V",
    "bits/value",
    "V bits",
    "PPL",
    "Δnll",
    "KLD",
    "KLD 99.9 %",
    "RMS Δp",
    "same top",
    "KV bytes",
)


def bytes_text(n: float) -> str:
    """A number of bytes in KiB, MiB or GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1024:.1f} KiB"


def rows(summary: list[dict]) -> list[list[str]]:
    """Cells of the table, one row a configuration; the reference's distances are dashes."""
    return [_row(record, is_reference=i == 0) for i, record in enumerate(summary)]


def _row(record: dict, is_reference: bool) -> list[str]:
    ppl = record["ppl"]
    cells = [
        record["config"],
        _number(record["bits_per_value"], ".3f"),
        _number(record["v_bits_per_value"], ".3f"),
        _with_error(ppl["ppl"], ppl["se"], 3),
    ]
    if is_reference:
        cells += ["–"] * 5
    else:
        delta, kld, same = record["delta_nll"], record["kld"], record["same_top"]
        cells += [
            _with_error(delta["mean"], delta["se"], 4, sign="+"),
            _with_error(kld["mean"], kld["se"], 5),
            f"{kld['p99.9']:.3f}",
            f"{100 * record['delta_p']['rms']:.2f} %",
            _with_error(100 * same["mean"], same["se"] and 100 * same["se"], 2) + " %",
        ]
    return [*cells, bytes_text(record["kv_bytes"])]


def _number(value: float | None, spec: str) -> str:
    return "?" if value is None else format(value, spec)


def _with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    text = f"{value:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def as_text(summary: list[dict]) -> str:
    """The table with aligned columns."""
    cells = [list(COLUMNS), *rows(summary)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(padded))
    return "\n".join(lines)


def as_markdown(summary: list[dict]) -> str:
    """The table in Markdown."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in rows(summary)),
    ]
    return "\n".join(lines)


def as_json(record: dict) -> str:
    """The whole record."""
    return json.dumps(record, indent=1, ensure_ascii=False)


def heading(record: dict) -> str:
    """What was run, in two lines."""
    text, environment = record["text"], record["environment"]
    return (
        f"{record['model']['name']} on {text['name']} (sha256 {text['sha256'][:12]}…), "
        f"{record['n_windows']} windows of {record['n_ctx']}, "
        f"{record['results'][0]['n_predictions']} predictions\n"
        f"back-end {record['backend']}, mlx {environment['mlx']}, "
        f"mlx-lm {environment['mlx_lm']}, mlx_turbokv {environment['mlx_turbokv']}, "
        f"{environment['device']}"
    )


def centring_notes(centred: dict[str, str | None]) -> list[str]:
    """A sentence on each configuration whose keys are centred."""
    return [
        f"{name}: {how}." for name, how in centred.items() if how and how.startswith("keys centred")
    ]


def footnotes(record: dict) -> str:
    """How to read the errors and the bytes."""
    first = record["results"][0]["config"]
    over = record["results"][-1]["delta_nll"]["se_over"]
    lines = [
        f"Δnll, KLD, Δp and same top are against {first}, position by position; ± is one "
        f"standard error, of PPL over tokens, of the others over {over}."
    ]
    lines += centring_notes({row["config"]: row.get("centred") for row in record["results"]})
    if record["model"].get("kv_itemsize") == 4:
        lines.append(
            "This model runs in float32 here: its f16 rows hold 4 bytes a value, and bits/value "
            "counts them as the 2 of a half-precision model."
        )
    return "\n".join(lines)
