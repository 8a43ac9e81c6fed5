"""What was measured on a model beside the paper's printed tables, for the page of paper.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from few_windows import interval_of
from paper_claims import Results, gap_closed, losses
from paper_keys import gaps, split
from paper_roles import K_BITS, config_names, tables_of

from . import table

NONE = "–"


Part = tuple[int, Results]  # windows, and rows by role


def replaces(newer: Part, older: Part) -> bool:
    """Whether a newer table of a length has as many windows and configurations."""
    return newer[0] >= older[0] and len(newer[1]) >= len(older[1])


@dataclass
class Measured:
    """What was measured on one model.

    tables: (windows, rows by role) by the tokens of a window.
    about: a sentence for each record.
    """

    label: str
    tables: dict[int, Part] = field(default_factory=dict)
    keys: dict | None = None
    needle: dict | None = None
    about: list[str] = field(default_factory=list)

    def add(self, record: dict) -> None:
        """Take in a record, the older ones first."""
        found = {n: part for n, part in tables_of(record).items()
                 if n not in self.tables or replaces(part, self.tables[n])}  # fmt: skip
        self.tables |= found
        self.keys = record.get("keys") or self.keys
        lengths = [f"{windows} of {n:,}" for n, (windows, _) in sorted(found.items())]
        device = (record.get("environment") or record)["device"]
        if lengths:
            self.about.append(
                f"{self.label}: windows of {record['text']['name']}, {', '.join(lengths)} tokens; "
                f"{device}, back-end {record['backend']}, in {record['model']['dtype']}."
            )

    def results(self, n_ctx: int) -> Results:
        """Rows by role of one length; empty where it was not measured."""
        return self.tables.get(n_ctx, (0, {}))[1]

    def length_for(self, n_ctx: int) -> int | None:
        """The longest measured windows beyond the shortest, up to a length of the paper's."""
        lengths = [n for n in sorted(self.tables)[1:] if n <= n_ctx]
        return max(lengths, default=None)


def _mean(row: dict, name: str, key: str, digits: int) -> str:
    error = row[name]["se"]
    text = f"{row[name][key]:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def _against(row: dict, baseline: dict) -> str:
    """PPL against a baseline in percent, paired over windows."""
    d = losses(row) - losses(baseline)
    error = f" ± {100 * d.std(ddof=1) / np.sqrt(d.size):.2f}" if d.size > 1 else ""
    return f"{100 * np.expm1(d.mean()):+.2f}{error} %"


def quality_cells(results: Results, role: str) -> list[str]:
    """PPL, PPL against uniform turbo2, and KLD of a role."""
    row, baseline = results.get(role), results.get("turbo2")
    if row is None:
        return [NONE] * 3
    against = NONE if baseline is None else _against(row, baseline)
    return [_mean(row, "ppl", "ppl", 3), against, _mean(row, "kld", "mean", 5)]


def bits_cells(results: Results, role: str) -> list[str]:
    """Bits per value of V."""
    row = results.get(role, {})
    bits = row.get("v_bits", row.get("v_bits_per_value"))
    return [NONE if bits is None else f"{bits:.2f}"]


def gap_cells(results: Results, role: str) -> list[str]:
    """Share of the gap from turbo2 to turbo3 that a role closes."""
    found = gap_closed(results, role)
    if found is None:
        return [NONE]
    text, interval = f"{100 * found['share']:.0f} %", found["interval"]
    if interval is None:
        return [f"{text} (turbo3 not clearly better)"]
    return [f"{text} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"]


QUALITY = quality_cells, (": PPL", "against turbo2", "KLD")
GAP = gap_cells, ("",)
BITS = bits_cells, ("",)


def printed_tables(
    tables: list[dict], models: list[tuple[Measured, int]], kind: tuple[Any, tuple[str, ...]],
    n_ctx: int | None = None,
) -> list[str]:  # fmt: skip
    """Tables of the paper, with what was measured here in the last columns.

    Args:
        models: with the length of the windows that are shown.
        n_ctx: the paper's, where columns say which length is ours.
    """
    cells, names = kind
    parts = []
    for printed in tables:
        header = ["V (K in q8_0)", *(f"{m}, paper" for m in printed["models"])]
        for model, n in models:
            at = f" at {n:,}" if n_ctx is not None else ""
            header += [f"{model.label}{at}{names[0]}", *names[1:]]
        rows = []
        for role, row in printed["rows"].items():
            shown = [NONE if x is None else x if isinstance(x, str) else f"{x:g}" for x in row]
            here = [cells(model.results(n), role) for model, n in models]
            rows.append([role, *shown, *sum(here, [])])
        parts.append(f"## {printed['title']}\n\n{table(header, rows)}")
    return parts


def keys_tables(models: list[Measured], printed: dict) -> str:
    """Norms of keys by layer, and scores with quantised keys in boundary and middle layers."""
    header, rows = ["layers", "norm, paper (Qwen3-4B)"], []
    for model in models:
        header += [f"{model.label}: norm", "excess kurtosis"]
    for what in ("layer 0", "boundary, mean", "middle, mean", "middle, least to most"):
        cells = [_norm_cells(model.keys or {}, what) for model in models]
        rows.append([what, printed["norms"].get(what, NONE), *sum(cells, [])])
    gap_header, gap_rows = ["K", "gap, paper (Qwen3-4B)"], []
    for model in models:
        gap_header += [f"{model.label}: boundary", "middle", "gap (95 %)"]
    for bits in K_BITS:
        cells = [_gap_cells(model.keys or {}, bits) for model in models]
        gap_rows.append([f"turbo{bits}", printed["gap"][str(bits)], *sum(cells, [])])
    windows = " and ".join(
        f"{m.keys['windows']} windows of {m.keys['tokens']} on {m.label}" for m in models if m.keys
    )
    return "\n\n".join([
        "## Keys by layer",
        f"The paper's independent validation. {windows}. Boundary: the first 2 and the last 2 KV "
        "layers. The excess kurtosis is that of a key's rotated values, 0 for Gaussian ones.",
        table(header, rows),
        "Cosine between scores with quantised keys and with the model's own, of a query with all "
        "keys before it, without softmax; the paper does not say what its gap is of.",
        table(gap_header, gap_rows),
    ])  # fmt: skip


def _norm_cells(keys: dict, what: str) -> list[str]:
    cells = []
    for name, digits in (("norms", 1), ("kurtosis", 2)):
        edge, middle = split(keys[name])
        if what == "layer 0":
            text = f"{edge[0].mean():.{digits}f}"
        elif what == "boundary, mean":
            text = f"{edge.mean():.{digits}f}"
        elif not len(middle):
            text = NONE
        elif what == "middle, mean":
            text = f"{middle.mean():.{digits}f}"
        else:
            means = middle.mean(axis=1)
            text = f"{means.min():.{digits}f} to {means.max():.{digits}f}"
        cells.append(text)
    return cells


def _gap_cells(keys: dict, bits: int) -> list[str]:
    found = gaps(keys).get(bits)
    if found is None:
        return [NONE] * 3
    edge, middle = split(keys["cosines"][str(bits)])
    text, ends = f"{found.mean():+.4f}", interval_of(found)
    text += "" if ends is None else f" ({ends[0]:+.4f} to {ends[1]:+.4f})"
    return [f"{edge.mean():.4f}", f"{middle.mean():.4f}", text]


def speed_table(printed: dict, bench: dict) -> str:
    """Prefill and decode of the paper's machine, and of a bench record at its longest point."""
    names, rows = config_names(""), []
    for role, speeds in printed.items():
        here = [r for r in bench["rows"] if r["config"] in (names[role], role) and "error" not in r]
        row = max(here, key=lambda r: r["tokens"], default={})
        cells = [row.get(f"{kind}_tps") for kind in ("prompt", "generation")]
        rows.append([role, *(f"{x:g}" for x in speeds)])
        rows[-1] += [f"{cell['median']:.1f}" if cell else NONE for cell in cells]
    model = bench["model"]["name"]
    header = ["V (K in q8_0)", "prefill, paper", "decode, paper", f"{model}: prefill", "decode"]
    title = "## Tokens a second (paper: phi-4, M5 Max, 8,192 tokens)"
    return f"{title}\n\n{table(header, rows)}"
