"""The plots of the report alone; evaluate/plots.py has those of speed and needles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..evaluate.plots import (
    COLORS,
    GRID,
    INK,
    bytes_unit,
    legend_below,
    new_figure,
    token_axis,
)
from .summary import pareto_front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST_KLD = 1e-6


def divergence_figure(results: list[dict], colors: dict[str, str]) -> Figure:
    """KLD against bits per value, with the Pareto front.

    Args:
        results: the configurations of a perplexity record after the reference.
        colors: of the configurations.
    """
    rows = [r for r in results if r["bits_per_value"] is not None]
    figure, axes = new_figure(8.4, 4.8)
    ax = axes[0, 0]
    points = [(r["bits_per_value"], max(r["kld"]["mean"], LOWEST_KLD)) for r in rows]
    front = pareto_front(points)
    ax.set_yscale("log")
    ax.plot(*zip(*(points[i] for i in front)), color=GRID, linewidth=1, zorder=1, label="front")
    for i, (row, (x, y)) in enumerate(zip(rows, points)):
        # A logarithmic axis ends above zero.
        error = min(row["kld"]["se"] or 0.0, 0.9 * y)
        face = {} if i in front else {"fillstyle": "none"}
        ax.errorbar(
            x, y, error, color=colors[row["config"]], marker="o", markersize=5, capsize=2,
            zorder=2, **face,
        )  # fmt: skip
    ax.set_xlabel("bits per value, K and V together")
    ax.set_ylabel("KLD, nats")
    ax.margins(x=0.14, y=0.12)
    label_points(ax, points, [r["config"] for r in rows])
    return figure


# Offsets of a name from its point, in points: right, left, above, below, then farther.
_PLACES = (
    (7, 0), (7, 10), (7, -10), (-7, 0), (-7, 10), (-7, -10), (7, 21), (7, -21), (-7, 21),
    (-7, -21), (16, 32), (16, -32), (-16, 32), (-16, -32), (24, 44), (24, -44), (-24, -44),
)  # fmt: skip
_LETTER, _LINE = 5.2, 10.0  # size of a letter and of a line at 8 points


def label_points(ax, points: list[tuple[float, float]], names: list[str]) -> None:
    """Names next to their points, each where it covers no other; far ones get a thin line.

    Args:
        names: one a point, empty for a point that is only kept clear.
    """
    ax.figure.draw_without_rendering()  # the axes must have their place before names get theirs
    scale = 72 / ax.figure.dpi
    at = [tuple(scale * c for c in ax.transData.transform(point)) for point in points]
    inside = tuple(scale * c for c in ax.bbox.extents)
    taken = [(x - 6, y - 11, x + 6, y + 11) for x, y in at]  # a name under a dot is that dot's
    for point, (x, y), name in sorted(zip(points, at, names), key=lambda entry: entry[1]):
        if not name:
            continue
        width = _LETTER * len(name)

        def box(place: tuple[int, int], x: float = x, y: float = y, width: float = width) -> tuple:
            left = x + place[0] - (width if place[0] < 0 else 0)
            return left, y + place[1] - _LINE / 2, left + width, y + place[1] + _LINE / 2

        def covered(place: tuple[int, int], box: Callable = box) -> float:
            at = box(place)
            beyond = (at[2] - at[0]) * (at[3] - at[1]) - _overlap(at, inside)
            return beyond + sum(_overlap(at, other) for other in taken)

        place = min(_PLACES, key=lambda p: (round(covered(p), 3), _PLACES.index(p)))
        taken.append(box(place))
        far = abs(place[1]) > 10
        ax.annotate(
            name, point, place, textcoords="offset points", fontsize=8, color=INK, va="center",
            ha="left" if place[0] > 0 else "right",
            arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.6} if far else None,
        )  # fmt: skip


def _overlap(a: tuple, b: tuple) -> float:
    """The area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def position_figure(results: list[dict], colors: dict[str, str]) -> Figure:
    """Added loss against the position in the window."""
    figure, axes = new_figure(7.6, 3.9)
    ax = axes[0, 0]
    ax.axhline(0, color=GRID, linewidth=0.8)
    for row in results:
        parts = row["by_position"]["delta_nll"]
        x = [sum(part["positions"]) / 2 for part in parts]
        y = [part["mean"] for part in parts]
        error = [part["se"] or 0.0 for part in parts]
        ax.errorbar(
            x, y, error, color=colors[row["config"]], marker="o", markersize=3, linewidth=1.2,
            capsize=2, label=row["config"],
        )  # fmt: skip
    ax.set_xlabel("position in the window")
    ax.set_ylabel("Δnll, nats")
    legend_below(figure, ax)
    return figure


def sensitivity_figure(sensitivity: dict, formats: list[str] | None = None) -> Figure:
    """What each format adds to the KLD in each layer's K, and in its V.

    Args:
        sensitivity: of a record of ``calibrate``: ``layers``, each with "k" and "v" by format.
    """
    layers = sensitivity["layers"]
    formats = formats or list(layers[0]["k"])
    figure, axes = new_figure(9.4, 3.6, 2, sharey=True)
    for ax, part in zip(axes.flat, ("k", "v")):
        for color, name in zip(COLORS, formats):
            values = [max(layer[part][name]["mean"], LOWEST_KLD) for layer in layers]
            ax.plot(
                range(len(layers)), values, color=color, marker="o", markersize=3, linewidth=1.1,
                label=name,
            )  # fmt: skip
        ax.set_yscale("log")
        ax.set_xlabel("KV layer")
        ax.set_title(f"{part.upper()} of one layer")
    axes[0, 0].set_ylabel("KLD added, nats")
    legend_below(figure, axes[0, 0])
    return figure


def memory_figure(plan: dict, colors: dict[str, str]) -> Figure:
    """Bytes of the cache against context, as computed.

    Args:
        plan: a plan as JSON.
        colors: of the configurations.
    """
    contexts = sorted(int(n) for n in plan["f16_bytes"])
    unit, size = bytes_unit(max(plan["f16_bytes"].values()))
    figure, axes = new_figure(7.6, 3.9)
    ax = axes[0, 0]
    for row in plan["rows"]:
        held = {int(n): b for n, b in row["bytes"].items()}
        y = [held[n] / size for n in contexts]
        ax.plot(contexts, y, color=colors[row["name"]], linewidth=1.4, label=row["name"])
    token_axis(ax, contexts)
    ax.set_yscale("log")
    ax.set_ylabel(f"KV cache, {unit}")
    legend_below(figure, ax)
    return figure
