"""KLD against bits per value, this package's configurations and mlx-lm's kv_bits."""

from __future__ import annotations

from pathlib import Path

from mlx_turbokv.evaluate.plots import COLORS, legend_below, new_figure
from mlx_turbokv.report.figures import label_points

from . import read

KINDS = ("K and V formats, the same in every layer", "calibrated policies", "the paper's policies",
         "mlx-lm kv_bits")  # fmt: skip
MARKERS = ("o", "D", "s", "^")
# The points that get a name.
NAMED = (
    "q8_0/q8_0", "q8_0/turbo3", "q8_0/turbo2", "turbo6/turbo5", "turbo5/turbo5", "turbo4/turbo4",
    "turbo4/turbo3", "turbo3/turbo3", "turbo2/turbo2", "la-v7", "mlx-kv8:64", "mlx-kv4:64",
    "mlx-kv4:32", "mlx-kv3:64", "mlx-kv2:64",
)  # fmt: skip


def kind_of(config: str) -> str:
    """Which of KINDS a configuration is."""
    if config.endswith(".json"):
        return KINDS[1]
    if config.startswith("mlx-kv"):
        return KINDS[3]
    return KINDS[0] if "/" in config else KINDS[2]


def draw(path: Path) -> None:
    """Write the SVG: 95 % intervals over windows, on a white ground for light and dark pages."""
    record = read("quality")
    results = record["results"][1:]
    figure, axes = new_figure(8.4, 5.2)
    ax = axes[0, 0]
    ax.set_yscale("log")
    ax.set_xlabel("bits per value, K and V together, scales included")
    ax.set_ylabel("KLD against f16, nats a token (log scale)")
    ax.set_title(f"{record['model']['name']}, wikitext-2, {record['n_windows']} windows of "
                 f"{record['n_ctx']} tokens")  # fmt: skip
    for kind, color, marker in zip(KINDS, COLORS, MARKERS):
        rows = [r for r in results if kind_of(r["config"]) == kind]
        rows.sort(key=lambda r: r["bits_per_value"])
        y = [r["kld"]["mean"] for r in rows]
        ends = [r["kld"]["interval"] for r in rows]
        error = [[m - e[0] for m, e in zip(y, ends)], [e[1] - m for m, e in zip(y, ends)]]
        ax.errorbar(
            [r["bits_per_value"] for r in rows], y, error, color=color, linewidth=1, marker=marker,
            linestyle="-" if kind == KINDS[1] else "", markersize=5, capsize=2, label=kind,
        )  # fmt: skip
    legend_below(figure, ax)
    points = [(r["bits_per_value"], r["kld"]["mean"]) for r in results]
    label_points(ax, points, [r["config"] if r["config"] in NAMED else "" for r in results])
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
