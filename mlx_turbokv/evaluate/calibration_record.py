"""The results of a calibration: policy files with their evidence, and a record."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..model.shapes import KVShape
from ..policy import Protection
from ..policy.files import write_layer_list
from . import statistics
from .calibrate import Assigned, row_sizes
from .perplexity import Evaluation
from .sensitivity import PARTS, Change, Sensitivity


def file_name(budget: str) -> str:
    """The policy file of a budget: bits-4.5.json, bits-la-v7.json."""
    name = Path(budget).stem if budget.lower().endswith(".json") else budget
    return f"bits-{re.sub(r'[^a-zA-Z0-9_.-]+', '-', name)}.json"


def sensitivity_record(
    found: Sensitivity, shapes: Sequence[KVShape], formats: Sequence[str]
) -> dict:
    """What each format adds to the KLD in each slot, with errors over windows, and its bytes."""
    sizes = row_sizes(shapes, formats)

    def slot(layer: int, part: int) -> dict:
        return {
            fmt: statistics.mean_and_error(found.added(Change(layer, part, fmt)))
            | {"bytes_a_token": int(sizes[layer, part, i])}
            for i, fmt in enumerate(formats)
        }

    return {
        "base": found.base,
        "base_kld": statistics.mean_and_error(found.base_kld),
        "layers": [
            {name: slot(layer, part) for part, name in enumerate(PARTS)}
            for layer in range(len(found.base))
        ],
    }


def assigned_record(assigned: Assigned, evaluation: Evaluation, name: str) -> dict:
    """A policy's predicted KLD, and what its whole assignment measures on the same windows."""
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
        "predicted_kld": statistics.mean_with_interval(assigned.predicted),
        "measured_kld": statistics.mean_with_interval(measured),
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


def write_policies(
    folder: Path, pairs: dict[str, list], protection: Protection, record: dict
) -> None:
    """One policy file a budget, each with the evidence for it.

    Args:
        pairs: formats of every KV layer, by file name.
        protection: the protected tokens that they were measured with.
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
        write_layer_list(folder / name, pairs[name], protection, **evidence)
