"""Page of docs/results about accuracy on tasks."""

from __future__ import annotations

from . import read, source, table

NOTES = {
    "gemma-3-270m-q4_k_m": "Its 3 KV layers are all boundary layers, so la-v7 is q8_0/q8_0 here; "
    "its other 15 layers have windows and keep mlx-lm's own cache.",
}


def accuracy() -> str:
    """lm-eval through packed caches."""
    record = read("lm_eval")
    parts = [
        "# Accuracy with lm-eval",
        "`mlx_lm.evaluate` (lm-eval) with packed caches ([how](../evaluation.md#lm-eval)), on "
        f"{record['task']} of BIG-bench (which of four goals does a step serve?), whose data the "
        f"package {record['data']} brings. Examples stand before each item, in the same order for "
        "all configurations. Differences to the first configuration are paired, item by item; "
        "intervals are two standard errors. "
        "Configurations of a command without a row were not measured: none with protected tokens, "
        "the default, has been.",
    ]
    for name, about in record["models"].items():
        rows = [[row["config"], *_cells(row)] for row in about["rows"]]
        header = ["K/V", "items", "acc", "acc_norm", "Δ acc_norm", "items answered otherwise",
                  "Δ log p of the right answer"]  # fmt: skip
        shots = f"{about['num_shots']} examples before each item. {NOTES.get(name, '')}".rstrip()
        parts += [f"## {name}", shots, table(header, rows), source("lm_eval", about)]
    return "\n\n".join(parts)


def _cells(row: dict) -> list[str]:
    apart, likelihood = row["acc_norm"]["difference"], row["log_likelihood"]["difference"]
    shares = [_share(row[name]["mean"]) for name in ("acc", "acc_norm")]
    return [str(row["items"]), *shares, _share(apart), str(row["acc_norm"]["changed"]),
            f"{likelihood[0]:+.2f} ± {2 * likelihood[1]:.2f}"]  # fmt: skip


def _share(found: list[float]) -> str:
    mean, error = found
    return f"{mean:.1%} ± {2 * error:.1%}"
