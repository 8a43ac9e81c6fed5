"""The report as one HTML page without external files."""

from __future__ import annotations

from collections.abc import Callable, Set
from html import escape
from importlib.resources import files

from ..evaluate import plots, tables
from ..evaluate.tables import Table
from . import figures, order, summary
from .plan_table import table_of_json
from .recommendation import recommendation

Section = tuple[str, str, str]  # id, title, HTML


def build_page(record: dict) -> str:
    """The page of a record; parts that are missing are left out.

    Args:
        record: ``model`` and ``environment``, and as many of ``perplexity``, ``needle``, ``plan``,
            ``bench`` and ``calibrate`` as there are.

    Raises: InputError if matplotlib is missing.
    """
    record = order.ordered(record)
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
        f"<title>{name}: KV cache report</title>\n<style>\n{style}</style>\n</head>\n"
        "<body>\n<main>\n"
        f"<h1>{name}: KV cache report</h1>\n{_about(record)}\n<nav>{links}</nav>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def check_calibration(record: dict) -> None:
    """Raises: what a record of calibrate lacks, of any kind."""
    _sensitivity({"calibrate": record})


def _about(record: dict) -> str:
    environment = record["environment"]
    return (
        f'<p class="soft">{escape(environment["device"])}, back-end {escape(record["backend"])}, '
        f"mlx {environment['mlx']}, mlx-lm {environment['mlx_lm']}, "
        f"mlx_turbokv {environment['mlx_turbokv']}</p>"
    )


def _summary(record: dict) -> Section:
    """One line a configuration, over all parts."""
    table, front = summary.table_of(record)
    said = recommendation(record)
    advice = f'<p class="advice">{escape(said)}</p>' if said else ""
    return "summary", "Summary", advice + _table(table, front) + _notes(table)


def _quality(record: dict) -> Section:
    others = record["perplexity"]["results"][1:]
    table = tables.perplexity_table(record["perplexity"])
    colors = order.colors(record)
    html = _heading(table) + _table(_without_bytes(table), summary.front_of(others))
    html += _notes(table) + _figure(
        figures.divergence_figure(others, colors),
        "KLD against bits per value",
        "Divergence from the f16 run against the bits that K and V take together, with one "
        "standard error over windows. The line joins what nothing beats in both.",
    )
    html += _figure(
        figures.position_figure(others, colors),
        "Loss added by position",
        "What the compressed cache adds to the loss, by position in the window, with one standard "
        "error over windows: a cost that grows with the context would rise to the right.",
    )
    return "quality", "Prediction quality", html


def _needle(record: dict) -> Section:
    part = record["needle"]
    table = tables.needle_table(part)
    if part["not_measured"]:
        table.notes.append(f"{part['not_measured']} cases were not measured.")
    html = _heading(table) + _table(table) + _notes(table)
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
    table = table_of_json(record["plan"])
    html = _table(table) + _notes(table)
    html += _figure(
        figures.memory_figure(record["plan"], order.colors(record)),
        "Memory against context",
        "Bytes of the KV cache as computed, scales and protected tokens included; f16 in 16 bits.",
    )
    return "memory", "Memory", html


def _speed(record: dict) -> Section:
    part = record["bench"]
    table = tables.speed_table(part)
    header, *rows = ([row[1], row[0], *row[2:]] for row in [table.header, *table.rows])
    html = _heading(table) + _table(_without_bytes(Table(header, rows))) + _notes(table)
    if any("error" not in row for row in part["rows"]):
        html += _figure(
            plots.speed_figure(part, order.colors(record)),
            "Speed and memory against context",
            "Medians, with the slowest and the fastest trial.",
        )
    return "speed", "Speed", html


def _origins(record: dict) -> Section:
    html = ""
    for name in ("perplexity", "needle", "calibrate", "plan", "bench"):
        part = record.get(name) or {}
        text = part.get("text")
        entries = {
            "command": part.get("command"),
            "commit": part.get("commit"),
            "text": text and f"{text['name']}, sha256 {text['sha256']}",
            "seconds": part.get("seconds"),
        }
        entries = {key: value for key, value in entries.items() if value}
        html += _definitions(name, entries) if entries else ""
    html += _definitions("environment", record["environment"])
    return "origins", "Where the figures come from", html


def _definitions(title: str, entries: dict) -> str:
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in entries.items()
    )
    return f"<h3>{title}</h3><dl>{items}</dl>"


def _without_bytes(table: Table) -> Table:
    """A table without the bytes that a run held: the report gives computed ones."""
    at = list(table.header).index("KV bytes")
    rows = [[cell for i, cell in enumerate(row) if i != at] for row in table.rows]
    return Table([name for name in table.header if name != "KV bytes"], rows)


def _heading(table: Table) -> str:
    return f"<p>{escape(table.heading.splitlines()[0])}.</p>"


def _table(table: Table, marked: Set[str] = frozenset()) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    lines = []
    for row in table.rows:
        rest = [*row[1:], *[""] * (len(table.header) - len(row))]
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        kind = ' class="front"' if row[0] in marked else ""
        lines.append(f'<tr{kind}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _notes(table: Table) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)


def _figure(figure, title: str, caption: str) -> str:
    return (
        f'<figure><div class="plot" tabindex="0">{plots.as_svg(figure, title)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
