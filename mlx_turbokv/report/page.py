"""The report as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from importlib.resources import files

from ..evaluate import needle_table, plots, speed_table, table
from . import figures, summary
from .plan_table import table_of_json

Section = tuple[str, str, str]  # id, title, HTML


def build_page(record: dict) -> str:
    """The page of a whole record; parts that it has not are left out.

    Args:
        record: ``model`` and ``environment``, and as many of ``perplexity``, ``needle``, ``plan``,
            ``bench`` and ``calibrate`` as there are.

    Raises: InputError if matplotlib is missing.
    """
    makers: dict[str, Callable[[dict], Section]] = {
        "perplexity": _quality,
        "needle": _needle,
        "calibrate": _sensitivity,
        "plan": _memory,
        "bench": _speed,
    }
    sections = [_summary(record)]
    sections += [make(record) for name, make in makers.items() if record.get(name)]
    sections.append(_origins(record))
    name = escape(record["model"]["name"])
    style = (files("mlx_turbokv.report") / "style.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{at}">{title}</a>' for at, title, _ in sections)
    body = "".join(
        f'<section id="{at}"><h2>{title}</h2>{html}</section>' for at, title, html in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: KV cache report</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{name}: KV cache report</h1>\n{_about(record)}\n<nav>{links}</nav>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _about(record: dict) -> str:
    environment = record["environment"]
    return (
        f'<p class="soft">{escape(environment["device"])}, back-end {escape(record["backend"])}, '
        f"mlx {environment['mlx']}, mlx-lm {environment['mlx_lm']}, "
        f"mlx_turbokv {environment['mlx_turbokv']}</p>"
    )


def _summary(record: dict) -> Section:
    """Each configuration in one line, over all parts."""
    header, rows, front = summary.table_of(record)
    html = _table(header, rows, front) + "".join(_notes(n) for n in summary.notes(record))
    return "summary", "Summary", html


def _quality(record: dict) -> Section:
    part = record["perplexity"]
    others = part["results"][1:]
    rows = table.rows(part["results"])
    html = f"<p>{escape(table.heading(part).splitlines()[0])}.</p>"
    html += _table(list(table.COLUMNS), rows, summary.front_of(others))
    html += _notes(table.footnotes(part))
    html += _figure(
        figures.divergence_figure(others),
        "KLD against bits per value",
        "Divergence from the f16 run against the bits that K and V take together, with one "
        "standard error over windows. The line joins what nothing beats in both.",
    )
    html += _figure(
        figures.position_figure(others),
        "Loss added by position",
        "What the compressed cache adds to the loss, by position in the window, with one standard "
        "error over windows: a cost that grows with the context would rise to the right.",
    )
    return "quality", "Prediction quality", html


def _needle(record: dict) -> Section:
    part = record["needle"]
    header, rows = needle_table.cells(part["summary"])
    html = f"<p>{escape(needle_table.heading(part).splitlines()[0])}.</p>"
    html += _table(header, rows) + _notes(needle_table.footnotes(part))
    if part["not_measured"]:
        html += _notes(f"{part['not_measured']} cases were not measured.")
    html += _figure(
        plots.needle_figure(part),
        "Needles found by context and depth",
        "Above, the share of needles found; below, the log-probability of the right answer, "
        "averaged over kinds of needle and repeats.",
    )
    return "needle", "Needle in a haystack", html


def _sensitivity(record: dict) -> Section:
    part = record["calibrate"]
    c = part["calibration"]
    text = (
        f"What storing the K, or the V, of one layer in a format adds to the KLD, over "
        f"{c['n_windows']} windows of {c['n_ctx']} of {c['text']['name']}; the other layers hold "
        f"{c['base']}."
    )
    html = f"<p>{escape(text)}</p>"
    html += _figure(
        figures.sensitivity_figure(part["sensitivity"]),
        "Sensitivity by layer",
        "Values at the lower edge are at or below it: no cost could be told from none.",
    )
    return "sensitivity", "Sensitivity by layer", html


def _memory(record: dict) -> Section:
    header, rows, notes = table_of_json(record["plan"])
    html = _table(header, rows) + "".join(_notes(n) for n in notes)
    html += _figure(
        figures.memory_figure(record["plan"], record.get("bench")),
        "Memory against context",
        "Bytes of the KV cache, scales included. Circles are what a run held, spare rows included.",
    )
    return "memory", "Memory", html


def _speed(record: dict) -> Section:
    part = record["bench"]
    html = f"<p>{escape(speed_table.heading(part).splitlines()[0])}.</p>"
    rows = [[row[1], row[0], *row[2:]] for row in speed_table.cells(part["rows"])]
    header = [speed_table.HEADER[1], speed_table.HEADER[0], *speed_table.HEADER[2:]]
    html += _table(header, rows) + _notes(speed_table.footnotes(part))
    if any("error" not in row for row in part["rows"]):
        html += _figure(
            plots.speed_figure(part), "Speed and memory against context",
            "Medians, with the slowest and the fastest trial.",
        )  # fmt: skip
    return "speed", "Speed", html


def _origins(record: dict) -> Section:
    html = ""
    for name in ("perplexity", "needle", "calibrate", "plan", "bench"):
        part = record.get(name)
        if not part:
            continue
        entries = {"command": part.get("command"), "commit": part.get("commit")}
        if "text" in part:
            entries["text"] = f"{part['text']['name']}, sha256 {part['text']['sha256']}"
        entries["seconds"] = part.get("seconds")
        items = "".join(
            f"<dt>{key}</dt><dd>{escape(str(value))}</dd>"
            for key, value in entries.items()
            if value
        )
        html += f"<h3>{name}</h3><dl>{items}</dl>" if items else ""
    environment = "".join(
        f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in record["environment"].items()
    )
    html += f"<h3>environment</h3><dl>{environment}</dl>"
    return "origins", "Where the figures come from", html


def _table(header: list[str], rows: list[list[str]], marked: set[str] = frozenset()) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        kind = ' class="front"' if row[0] in marked else ""
        lines.append(f'<tr{kind}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _notes(text: str) -> str:
    return "".join(f'<p class="note">{escape(line)}</p>' for line in text.splitlines() if line)


def _figure(figure, title: str, caption: str) -> str:
    return (
        f'<figure><div class="plot" tabindex="0">{plots.as_svg(figure, title)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
