"""Draw KLD against bits per value from the records of scripts/quality_table.py.

python scripts/quality_plot.py --out docs/quality.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mlx_turbokv.evaluate.plots import COLORS, legend_below, new_figure  # noqa: E402
from mlx_turbokv.report.figures import label_points  # noqa: E402

RECORDS = ("quality", "quality_long")
KINDS = ("uniform", "calibrated", "the paper's policies", "mlx-lm")
MARKERS = ("o", "D", "s", "^")
# The names that are shown.
NAMED = (
    "q8_0/q8_0", "q8_0/turbo3", "q8_0/turbo2", "turbo6/turbo5", "turbo5/turbo5", "turbo4/turbo4",
    "turbo4/turbo3", "turbo3/turbo3", "turbo2/turbo2", "la-v7", "mlx-kv8:64", "mlx-kv4:64",
    "mlx-kv4:32", "mlx-kv3:64", "mlx-kv2:64",
)  # fmt: skip


def kind_of(config: str) -> str:
    """Which of KINDS a configuration is."""
    if config.endswith(".json"):
        return "calibrated"
    if config.startswith("mlx-kv"):
        return "mlx-lm"
    return "uniform" if "/" in config else "the paper's policies"


def draw(records: list[dict], path: Path) -> None:
    """One panel a record, with 95 % intervals over windows."""
    figure, axes = new_figure(6.2 * len(records), 5.2, len(records), sharey=True)
    for ax, record in zip(axes.flat, records):
        ax.set_yscale("log")
        ax.set_xlabel("bits per value, K and V together")
        ax.set_title(f"{record['n_windows']} windows of {record['n_ctx']:,} tokens")
        for kind, color, marker in zip(KINDS, COLORS, MARKERS):
            rows = [r for r in record["results"][1:] if kind_of(r["config"]) == kind]
            rows.sort(key=lambda r: r["bits_per_value"])
            x = [r["bits_per_value"] for r in rows]
            y = [r["kld"]["mean"] for r in rows]
            ends = [r["kld"]["interval"] for r in rows]
            error = [[m - e[0] for m, e in zip(y, ends)], [e[1] - m for m, e in zip(y, ends)]]
            line = "-" if kind == "calibrated" else ""
            ax.errorbar(
                x, y, error, color=color, linestyle=line, linewidth=1, marker=marker, markersize=4,
                capsize=2, label=kind,
            )  # fmt: skip
    axes[0, 0].set_ylabel("KLD, nats a token")
    legend_below(figure, axes[0, 0])
    for ax, record in zip(axes.flat, records):
        rows = record["results"][1:]
        points = [(r["bits_per_value"], r["kld"]["mean"]) for r in rows]
        label_points(ax, points, [r["config"] if r["config"] in NAMED else "" for r in rows])
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/quality.svg")
    given = parser.parse_args()
    paths = [ROOT / f"benchmarks/{name}.json" for name in RECORDS]
    draw([json.loads(path.read_text(encoding="utf-8")) for path in paths], given.out)


if __name__ == "__main__":
    main()
