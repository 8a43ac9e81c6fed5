"""KLD against bits per value for each trained model, side by side."""

from __future__ import annotations

from pathlib import Path

from mlx_turbokv.evaluate.plots import COLORS, GRID, INK, legend_below, new_figure
from mlx_turbokv.policy.settings import PAIRS
from mlx_turbokv.report.figures import label_points

from . import tables

N_CTX = "2048"
PROTECTED, PLAIN, PAPER, MLX_LM, LLAMA_CPP = KINDS = (
    "K and V formats, first and newest tokens protected", "the same, none protected",
    "the paper's policies", "mlx-lm's kv_bits", "llama.cpp's q4_0, q5_1 (simulated)",
)  # fmt: skip
# colour, marker, whether its points are joined, and what a panel without it says is missing
STYLES = {
    PROTECTED: (COLORS[0], "o", True, "protected"), PLAIN: (COLORS[7], "o", True, "unprotected"),
    PAPER: (COLORS[1], "s", False, "the paper's"), MLX_LM: (COLORS[3], "^", False, "mlx-lm's"),
    LLAMA_CPP: (COLORS[2], "v", False, "llama.cpp's"),
}  # fmt: skip
# the settings by their names, others by their own
NAMED = {"/".join(pair): name for name, pair in PAIRS.items()} | {
    name: name for name in ("turbo2/turbo2", "q8_0/q8_0", "la-v7", "llama-q4_0")
} | {f"mlx-kv{bits}:64": f"kv_bits {bits}" for bits in (8, 4, 3)}  # fmt: skip
# pairs whose points are joined: K at most one bit above V, both turbo
LADDER = ("turbo6/turbo6", "turbo6/turbo5", "turbo5/turbo5", "turbo5/turbo4", "turbo4/turbo4",
          "turbo4/turbo3", "turbo3/turbo3", "turbo3/turbo2", "turbo2/turbo2")  # fmt: skip


def kind_of(row: dict) -> str | None:
    """Which of KINDS a row is; None for one that is not drawn."""
    name, protected = tables.base(row["config"]), row["protected"] is not None
    if name.startswith("mlx-kv"):
        return MLX_LM
    if name.startswith("llama-"):
        return LLAMA_CPP
    if "/" in name:
        return PROTECTED if protected else PLAIN
    # calibrated policies and the paper's with protected tokens are in the tables alone
    return None if protected or name.startswith("calibrated") else PAPER


def at(row: dict) -> tuple[float, float]:
    """Where a row is drawn: bits per value where its KLD was measured, and that."""
    return row["bits"], row["kld"]["mean"]


def draw(path: Path) -> None:
    """Write the SVG: 95 % intervals over windows, on a white ground for light and dark pages."""
    found = {name: r for name, r in tables.records().items() if N_CTX in r["tables"]}
    if not found:
        return
    figure, axes = new_figure(3.45 * len(found), 5.0, len(found), sharex=True, sharey=True)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_xlim(0.8, 9.4)
    for ax, (name, record) in zip(axes.flat, found.items()):
        ax.set_title(tables.NAMES[name])
        draw_model(ax, [row for row in tables.main_rows(record["tables"][N_CTX]) if kind_of(row)])
    axes[0, 0].set_ylabel("KLD against f16, nats a token")
    axes[0, len(found) // 2].set_xlabel(f"bits per value of K and V at {int(N_CTX):,} tokens")
    legend_below(figure, axes[0, 0])
    for ax, record in zip(axes.flat, found.values()):
        name_points(ax, [row for row in tables.main_rows(record["tables"][N_CTX]) if kind_of(row)])
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def draw_model(ax, rows: list[dict]) -> None:
    """The points of one model, and which kinds it lacks."""
    for kind, (color, marker, joined, _) in STYLES.items():
        chosen = [row for row in rows if kind_of(row) == kind]
        if joined and (line := ladder(chosen)):
            ax.plot(*zip(*line), color=color, linewidth=1.1, zorder=1)
        for row in chosen or [None]:
            x, y = at(row) if row else (float("nan"), float("nan"))  # every kind is in the legend
            low, high = row["kld"]["interval"] if row else (y, y)
            ax.errorbar(
                x, y, [[y - low], [high - y]], color=color, marker=marker, markersize=4.5,
                capsize=2, linestyle="", linewidth=1, label=kind,
            )  # fmt: skip
    if lacking := [style[3] for kind, style in STYLES.items() if kind not in map(kind_of, rows)]:
        text = "not measured:\n" + "\n".join(lacking)
        ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=8,
                color=INK, bbox={"facecolor": "none", "edgecolor": GRID})  # fmt: skip


def ladder(rows: list[dict]) -> list[tuple[float, float]]:
    """The points of rows that are joined, by bits."""
    return sorted(at(row) for row in rows if tables.base(row["config"]) in LADDER)


def name_points(ax, rows: list[dict]) -> None:
    """The names, away from points and lines."""
    points, names = [], []
    for row in rows:
        points.append(at(row))
        shown = kind_of(row) != PLAIN
        names.append(NAMED.get(tables.base(row["config"]), "") if shown else "")
    for kind in (PROTECTED, PLAIN):
        line = ladder([row for row in rows if kind_of(row) == kind])
        for (x, y), (x2, y2) in zip(line, line[1:]):
            for share in (0.33, 0.67):  # the axis is logarithmic
                points.append((x + share * (x2 - x), y ** (1 - share) * y2**share))
                names.append("")
    label_points(ax, points, names)
