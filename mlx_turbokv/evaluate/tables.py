"""Records as tables: aligned text, Markdown, or the cells alone for the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from .notes import centring_notes, protected_rows, protection_notes

NONE = "–"
MEASURED_KEYS = "centred and scaled by", "centred by their means"  # the latter in older records


@dataclass(frozen=True)
class Table:
    """A table with its heading and notes.

    header: names of the columns.
    rows: cells, one list a row. The last cell of a row shorter than the header may be wider than
        its column.
    heading: what was run.
    notes: sentences on how to read the table.
    left: columns that are aligned to the left; the others hold numbers.
    """

    header: Sequence[str]
    rows: list[list[str]]
    heading: str = ""
    notes: list[str] = field(default_factory=list)
    left: tuple[int, ...] = (0,)

    def text(self) -> str:
        """The table alone, in aligned columns."""
        lines = [self.header, *self.rows]
        n = len(self.header)
        widths = [max(len(x[i]) for x in lines if i < len(x) - (len(x) < n)) for i in range(n)]
        out = []
        for line in lines:
            cells = [
                cell.ljust(width) if i in self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            ]
            out.append("  ".join(cells).rstrip())
        return "\n".join(out)

    def markdown(self) -> str:
        """The table alone, in Markdown."""
        n = len(self.header)
        rules = ["---" if i in self.left else "---:" for i in range(n)]
        lines = [self.header, *([*row, *[""] * (n - len(row))] for row in self.rows)]
        head, *body = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([head, "|" + "|".join(rules) + "|", *body])

    def render(self, output: str) -> str:
        """Heading, table and notes, as ``output`` says: "markdown" or "text"."""
        table = self.markdown() if output == "markdown" else self.text()
        return "\n\n".join(filter(None, [self.heading, table, "\n".join(self.notes)]))


def bytes_text(n: float) -> str:
    """A number of bytes in KiB, MiB or GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n / 1024:.1f} KiB"


def _bits(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    text = f"{value:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def _environment(record: dict) -> str:
    environment = record["environment"]
    return (
        f"back-end {record['backend']}, mlx {environment['mlx']}, mlx-lm {environment['mlx_lm']}, "
        f"mlx_turbokv {environment['mlx_turbokv']}, {environment['device']}"
    )


def _model_on_text(record: dict, verb: str) -> str:
    text = record["text"]
    return f"{record['model']['name']}{verb} {text['name']} (sha256 {text['sha256'][:12]}…)"


PERPLEXITY_HEADER = (
    "K/V", "bits/value", "V bits", "PPL", "Δnll", "KLD", "KLD 99.9 %", "RMS Δp", "same top",
    "KV bytes",
)  # fmt: skip


def perplexity_table(record: dict) -> Table:
    """A record of ``perplexity``; the first configuration is the reference of the others."""
    results = record["results"]
    heading = (
        f"{_model_on_text(record, ' on')}, {record['n_windows']} windows of {record['n_ctx']}, "
        f"{results[0]['n_predictions']} predictions\n{_environment(record)}"
    )
    notes = [
        f"Δnll, KLD, Δp and same top are against {results[0]['config']}, position by position; ± "
        "is one standard error, of PPL over tokens, of the others over "
        f"{results[-1]['delta_nll']['se_over']}."
    ]
    notes += centring_notes({row["config"]: row.get("centred") for row in results})
    notes += protected_rows(results)
    notes += [f"Warning: {r['config']}: {text}" for r in results for text in r.get("warnings", ())]
    if record["model"].get("kv_itemsize") == 4:
        notes.append(
            "This model runs in float32 here: its f16 rows hold 4 bytes a value, and bits/value "
            "counts them as the 2 of a half-precision model."
        )
    return Table(PERPLEXITY_HEADER, perplexity_rows(results), heading, notes)


def perplexity_rows(results: list[dict]) -> list[list[str]]:
    """Cells of perplexity results; the first one's distances from itself are dashes."""
    return [_perplexity_row(result, i == 0) for i, result in enumerate(results)]


def _perplexity_row(result: dict, is_reference: bool) -> list[str]:
    ppl, distances = result["ppl"], [NONE] * 5
    if not is_reference:
        delta, kld, same = result["delta_nll"], result["kld"], result["same_top"]
        distances = [
            _with_error(delta["mean"], delta["se"], 4, sign="+"),
            _with_error(kld["mean"], kld["se"], 5),
            f"{kld['p99.9']:.3f}",
            f"{100 * result['delta_p']['rms']:.2f} %",
            _with_error(100 * same["mean"], same["se"] and 100 * same["se"], 2) + " %",
        ]
    return [
        result["config"],
        _bits(result["bits_per_value"]),
        _bits(result["v_bits_per_value"]),
        _with_error(ppl["ppl"], ppl["se"], 3),
        *distances,
        bytes_text(result["kv_bytes"]),
    ]


def needle_table(record: dict) -> Table:
    """A record of ``needle``."""
    kinds, n = ", ".join(record["kinds"]), len(record["depths"])
    heading = (
        f"{_model_on_text(record, ', needles in')}: {len(record['cases'])} cases ({kinds}; "
        f"{n} depth{'s' * (n > 1)})\n{_environment(record)}"
    )
    summary = record["summary"]
    notes = [
        "Found: the greedy answer is exactly the needle. Δ log p: log-probability of the right "
        f"answer, in nats, against {summary[0]['config']}, case by case, ± one standard error over "
        "cases."
    ]
    notes += centring_notes({row["config"]: row.get("centred") for row in summary})
    notes += protected_rows(summary)
    return Table(*needle_cells(summary), heading, notes)


def needle_cells(summary: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), with what was found at each context at the end."""
    header = ["K/V", "bits/value", "found", "of what f16 finds", "Δ log p of the answer"]
    header += [f"at {row['context']:,}" for row in summary[0]["by_context"]]
    rows = []
    for i, row in enumerate(summary):
        delta, compared = row["delta_logp"], [NONE, NONE]
        if i > 0:
            compared = [
                f"{row['found_of_reference']}/{row['reference_found']}",
                _with_error(delta["mean"], delta["se"], 3, sign="+"),
            ]
        found = [f"{part['found']}/{part['n']}" for part in [row, *row["by_context"]]]
        rows.append([row["config"], _bits(row["bits_per_value"]), found[0], *compared, *found[1:]])
    return header, rows


SPEED_HEADER = (
    "tokens", "K/V", "bits/value", "prompt tok/s", "of first", "generation tok/s", "of first",
    "Python ms/step", "peak above weights", "KV bytes",
)  # fmt: skip


def speed_table(record: dict) -> Table:
    """A record of ``bench``; a context that was filled without the model has no prompt speed."""
    batch = f"batches of {n} sequences, " if (n := record.get("batch_size", 1)) > 1 else ""
    heading = (
        f"{record['model']['name']}, {record['weights']}; {batch}{record['generation_tokens']} "
        f"tokens generated, {record['num_trials']} trials a row, configurations in turn\n"
        f"{_environment(record)}"
    )
    notes = [
        f"Medians, and the farthest trial from it; 'of first' is against {record['configs'][0]}, "
        "trial by trial, and more is faster."
    ]
    if any(row["kind"] == "context" for row in record["rows"]):
        notes.append(
            "Rows without a prompt speed: the cache was filled with random K and V, packed by the "
            "cache itself, without running the model; its memory is that of generation alone."
        )
    notes += centring_notes(record.get("centred", {}))
    notes += protection_notes(dict.fromkeys(record["configs"]) | record.get("protected", {}))
    if "doctor" in record.get("tuning", ""):
        notes.append(f"Tuning of decode: {record['tuning']}.")
    return Table(SPEED_HEADER, speed_rows(record["rows"]), heading, notes, left=(1,))


def speed_rows(rows: list[dict]) -> list[list[str]]:
    """Cells of the rows of a record of ``bench``; a failed one ends with its error."""
    return [_speed_row(row) for row in rows]


def _speed_row(row: dict) -> list[str]:
    head = [f"{row['tokens']:,}", row["config"], _bits(row["bits_per_value"])]
    if "error" in row:
        return [*head, f"failed: {row['error']}"]
    prompt = [NONE, NONE]
    if "prompt_tps" in row:
        prompt = [_spread(row["prompt_tps"]), times_text(row["prompt_of_first"])]
    return [
        *head,
        *prompt,
        _spread(row["generation_tps"]),
        times_text(row["generation_of_first"]),
        f"{row['build_ms']:.2f}",
        bytes_text(row["peak_bytes_above_weights"]),
        bytes_text(row["kv_bytes"]),
    ]


def _spread(spread: dict) -> str:
    low, high, middle = spread["min"], spread["max"], spread["median"]
    around = 100 * max(high - middle, middle - low) / middle
    return f"{middle:.1f} ±{around:.0f} %"


def times_text(ratio: float | None) -> str:
    """A ratio of speeds."""
    return "?" if ratio is None else f"{ratio:.2f}×"


def calibration_table(record: dict) -> Table:
    """A record of ``calibrate``: the policies, and what they are compared with."""
    held = {r["config"]: r for r in (record["held_out"] or {"results": []})["results"]}
    compared = list(next(iter(held.values()))["kld_ratio_to"]) if held else []
    header = ["policy", "bits/value", "K bits", "V bits", "predicted", "measured", "held-out KLD"]
    header += [f"/ {name}" for name in compared]
    policies = {at["policy"]: at for at in record["policies"]}
    others = {name: r for name, r in islice(held.items(), 1, None) if name not in policies}
    rows = []
    for name, at in {**policies, **others}.items():
        names = ("bits_per_value", "k_bits_per_value", "v_bits_per_value")
        own = [_kld(at[k]) if k in at else "" for k in ("predicted_kld", "measured_kld")]
        rows.append([name, *(f"{at[k]:.3f}" for k in names), *own, *_held_out(held.get(name))])
    return Table(header, rows, notes=_calibration_notes(record))


def _kld(summary: dict) -> str:
    return _with_error(summary["mean"], summary["se"], 5)


def _held_out(result: dict | None) -> list[str]:
    if result is None:
        return [NONE]
    ratios = result["kld_ratio_to"].values()
    return [_kld(result["kld"]), *(ratio_text(r["mean"], r["interval"]) for r in ratios)]


def ratio_text(mean: float | None, interval: Sequence[float] | None) -> str:
    """A ratio with its 95 % interval."""
    if mean is None:
        return NONE
    return f"{mean:.3f}" + ("" if interval is None else " ({:.3f} to {:.3f})".format(*interval))


def _calibration_notes(record: dict) -> list[str]:
    c, h = record["calibration"], record["held_out"]
    notes = [
        f"Predicted and measured KLD are over {c['n_windows']} windows of {c['n_ctx']} of "
        f"{c['text']['name']}, predicted as the sum of what each slot adds alone; ± is one "
        "standard error over windows."
    ]
    if repaired := max((at["costs_repaired"] for at in record["policies"]), default=0):
        notes.append(
            f"{repaired} measured costs did not fall with the bits and were evened out before "
            "assigning (isotonic regression)."
        )
    if c["keys"].startswith(MEASURED_KEYS):
        notes.append(f"Keys are {c['keys']}; what was measured is next to the policy files.")
    if h is None:
        return [*notes, "Not checked on held-out windows."]
    return [
        *notes,
        f"Held out: {h['n_windows']} windows of {h['n_ctx']} of {h['text']['name']}; ratios of "
        "KLD with 95 % intervals, paired over windows.",
    ]
