"""What a calibration leaves behind: policy files with their evidence, a record, and a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..model.shapes import KVShape
from ..policy.files import write_layer_list
from . import statistics
from .calibrate import Assigned, row_sizes
from .perplexity import Evaluation
from .sensitivity import PARTS, Change, Sensitivity

COLUMNS = ("policy", "bits/value", "K bits", "V bits", "predicted", "measured", "held-out KLD")
NO_COMPARISON = "–"


def file_name(budget: str) -> str:
    """The policy file of a budget: bits-4.5.json, bits-la-v7.json."""
    name = Path(budget).stem if budget.lower().endswith(".json") else budget
    return f"bits-{re.sub(r'[^a-zA-Z0-9_.-]+', '-', name)}.json"


def sensitivity_record(
    found: Sensitivity, shapes: Sequence[KVShape], formats: Sequence[str]
) -> dict:
    """What each format adds to the KLD in each slot, with errors over windows, and its bytes."""
    sizes = row_sizes(shapes, formats)
    layers = []
    for layer in range(len(found.base)):
        parts = {}
        for part, name in enumerate(PARTS):
            parts[name] = {
                fmt: statistics.mean_and_error(found.added(Change(layer, part, fmt)))
                | {"bytes_a_token": int(sizes[layer, part, i])}
                for i, fmt in enumerate(formats)
            }
        layers.append(parts)
    return {
        "base": found.base,
        "base_kld": statistics.mean_and_error(found.base_kld),
        "layers": layers,
    }


def assigned_record(assigned: Assigned, evaluation: Evaluation, name: str) -> dict:
    """A policy's prediction beside what its whole assignment measures on the same windows."""
    result = evaluation.result(name)
    measured = result.window_means("kld")
    return {
        "policy": name,
        "budget": assigned.budget.name,
        "budget_bytes_a_token": assigned.budget.n_bytes,
        "bytes_a_token": assigned.n_bytes,
        "bits_per_value": result.config.bits,
        "k_bits_per_value": result.config.k_bits,
        "v_bits_per_value": result.config.v_bits,
        "costs_repaired": assigned.repaired,
        "predicted_kld": assigned.prediction(),
        "measured_kld": statistics.mean_and_error(measured)
        | {"interval": statistics.bootstrap_interval(measured)},
        "measured_over_predicted": statistics.ratio(measured, assigned.predicted),
    }


def held_out_record(evaluation: Evaluation, compared: Sequence[str]) -> list[dict]:
    """Divergence on held-out windows, each with its ratio to the configurations compared with."""
    summary = evaluation.summary()
    by_name = {r["config"]: np.array(r["kld_by_window"]) for r in summary}
    for record in summary:
        record["kld_ratio_to"] = {
            name: statistics.ratio(by_name[record["config"]], by_name[name]) for name in compared
        }
    return summary


def write_policies(folder: Path, pairs: dict[str, list], record: dict) -> None:
    """One policy file a budget, each with the evidence for it.

    Args:
        pairs: formats of every KV layer, by file name.
        record: the whole calibration's.

    Raises: InputError where the folder cannot be written.
    """
    shared = ("model", "calibration", "sensitivity", "environment")
    for at in record["policies"]:
        name = at["policy"]
        held_out = None
        if record["held_out"]:
            found = {r["config"]: r for r in record["held_out"]["results"]}[name]
            names = ("kld", "delta_nll", "same_top", "kld_ratio_to", "n_predictions")
            held_out = {k: v for k, v in record["held_out"].items() if k != "results"}
            held_out |= {k: found[k] for k in names}
        evidence = {**at, "held_out": held_out, **{k: record[k] for k in shared}}
        write_layer_list(folder / name, pairs[name], **evidence)


def as_text(record: dict) -> str:
    """The table of the policies, and of what they are compared with."""
    held = {r["config"]: r for r in (record["held_out"] or {"results": []})["results"]}
    compared = list(next(iter(held.values()))["kld_ratio_to"]) if held else []
    rows = [[*COLUMNS, *(f"/ {name}" for name in compared)]]
    for at in record["policies"]:
        rows.append(
            [at["policy"], *_bits(at), _kld(at["predicted_kld"]), _kld(at["measured_kld"])]
            + _held(held.get(at["policy"]))
        )
    names = {at["policy"] for at in record["policies"]}
    rows += [[n, *_bits(r), "", "", *_held(r)] for n, r in list(held.items())[1:] if n not in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    )


def notes(record: dict) -> list[str]:
    """Sentences that belong under the table."""
    c = record["calibration"]
    lines = [
        f"Predicted and measured KLD are over {c['n_windows']} windows of {c['n_ctx']} of "
        f"{c['text']['name']}, predicted as the sum of what each slot adds alone; ± is one "
        "standard error over windows."
    ]
    if repaired := max((at["costs_repaired"] for at in record["policies"]), default=0):
        lines.append(
            f"{repaired} measured costs did not fall with the bits and were evened out before "
            "assigning (isotonic regression)."
        )
    if c["keys"].startswith("centred by their means"):
        lines.append(f"Keys are {c['keys']}; the means lie beside the policy files.")
    if record["held_out"]:
        h = record["held_out"]
        lines.append(
            f"Held out: {h['n_windows']} windows of {h['n_ctx']} of {h['text']['name']}; ratios of "
            "KLD with 95 % intervals, paired over windows."
        )
    else:
        lines.append("Not checked on held-out windows.")
    return lines


def _bits(record: dict) -> list[str]:
    names = ("bits_per_value", "k_bits_per_value", "v_bits_per_value")
    return [f"{record[name]:.3f}" for name in names]


def _kld(summary: dict) -> str:
    se = summary["se"]
    return f"{summary['mean']:.5f}" + ("" if se is None else f" ± {se:.5f}")


def _held(record: dict | None) -> list[str]:
    if record is None:
        return [NO_COMPARISON]
    return [_kld(record["kld"]), *(_ratio(found) for found in record["kld_ratio_to"].values())]


def _ratio(found: dict) -> str:
    if found["mean"] is None:
        return NO_COMPARISON
    if found["interval"] is None:
        return f"{found['mean']:.3f}"
    low, high = found["interval"]
    return f"{found['mean']:.3f} ({low:.3f} to {high:.3f})"
