"""Plots of records, with matplotlib: an optional extra, imported only when a plot is drawn."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Readable on white and on near-black.
COLORS = (
    "#4c8dd6", "#e08a1e", "#3fa66b", "#d1605e", "#9a79c9", "#a58a6f", "#d982b5", "#7f8c99",
    "#b3a636", "#3aa6a6", "#c26b3f", "#6f7fd1", "#8a5a44", "#5f9ea0", "#c04d8c", "#7a9a01",
)  # fmt: skip
INK = "#1d2126"  # text and axes in a PNG; the page's own colour in an SVG
GRID = "#8a8f98"
GIB = 2**30


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises: InputError naming the extra that brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "Plots need matplotlib, which is not installed: pip install matplotlib."
        ) from None


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1, **options):
    """A figure, its size in inches, and its axes in a 2D array; no window is opened."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, in the page's font
    matplotlib.rcParams["svg.hashsalt"] = "mlx_turbokv"  # the same record gives the same file
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        _style(ax)
    return figure, axes


def _style(ax: Axes) -> None:
    ax.set_facecolor("none")
    ax.tick_params(which="both", colors=INK, labelsize=9)  # minor ticks of a log axis as well
    for spine in ax.spines.values():
        spine.set_color(GRID)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
        label.set_color(INK)
    ax.title.set_fontsize(10)
    ax.grid(True, color=GRID, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def as_png(figure: Figure) -> bytes:
    """A PNG with a white background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def as_svg(figure: Figure, label: str) -> str:
    """An inline SVG with a transparent background and text in the page's colour.

    Args:
        label: what a screen reader says of it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    # Two figures of one page must not share ids.
    salt = re.sub(r"\W+", "-", label.lower())
    seen: set[str] = set()

    def once(match: re.Match) -> str:
        # matplotlib repeats a marker's definition; the first one is enough.
        name = f"{salt}-{match[1]}"
        if name in seen:
            return ""
        seen.add(name)
        return f'id="{name}"'

    text = re.sub(r'\bid="([^"]+)"', once, text)
    text = re.sub(r'(xlink:href="|href="|url\()#', rf"\1#{salt}-", text)
    # As wide as drawn where there is room, so that its text has the page's size.
    head = (
        f'<svg role="img" aria-label="{label}" style="--drawn:{1.15 * figure.get_figwidth():.3g}in"'
    )
    return text.replace("<svg", head, 1)


def token_axis(ax: Axes, values: list[int]) -> None:
    """A logarithmic axis of context lengths, with a tick at each."""
    ax.set_xscale("log", base=2)
    values = sorted(set(values))
    ax.set_xticks(values, [_tokens(n) for n in values])
    ax.minorticks_off()
    ax.set_xlim(values[0] / 1.15, values[-1] * 1.15)
    ax.set_xlabel("tokens of context")


def _tokens(n: int) -> str:
    return f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else f"{n:,}"


def speed_figure(record: dict, colors: dict[str, str] | None = None) -> Figure:
    """Generation and prompt speed, and peak memory above the weights, against context.

    Args:
        colors: of the configurations; others get those of COLORS in turn.

    Raises: InputError if no row was finished.
    """
    rows = [row for row in record["rows"] if "error" not in row]
    if not rows:
        raise InputError("The record has no finished row, so there is nothing to draw.")
    unit, size = bytes_unit(max(row["peak_bytes_above_weights"] for row in rows))
    panels = {"generation tok/s": lambda r: _spread(r["generation_tps"])}
    if any("prompt_tps" in row for row in rows):
        panels["prompt tok/s"] = lambda r: _spread(r.get("prompt_tps"))
    panels[f"peak above weights, {unit}"] = lambda r: (r["peak_bytes_above_weights"] / size, 0, 0)
    figure, axes = new_figure(3.6 * len(panels), 3.7, len(panels))
    for ax, (title, value) in zip(axes.flat, panels.items()):
        _lines_by_config(ax, colors or dict(zip(record["configs"], COLORS * 2)), rows, value)
        ax.set_title(title)
        ax.set_ylim(bottom=0)
    both = len({row["kind"] for row in rows}) == 2
    note = "dashed: after a real prompt; solid: a filled cache" if both else None
    legend_below(figure, axes[0, 0], note)
    return figure


def bytes_unit(largest: float) -> tuple[str, int]:
    """The unit for a number of bytes, and the unit's size."""
    return ("GiB", GIB) if largest >= GIB / 4 else ("MiB", 2**20)


def legend_below(figure: Figure, ax: Axes, title: str | None = None) -> None:
    """One legend for all panels, under them; each name once."""
    entries = dict(zip(*reversed(ax.get_legend_handles_labels())))
    widest = 40 + 4.8 * max(map(len, entries), default=0)  # points, at 8 points a letter
    columns = max(1, min(len(entries), int(72 * figure.get_figwidth() / widest)))
    box = figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False,
        fontsize=8, labelcolor=INK, title=title, title_fontsize=8,
    )  # fmt: skip
    box.get_title().set_color(INK)


def _lines_by_config(ax: Axes, colors: dict[str, str], rows: list[dict], value) -> None:
    drawn: list[int] = []
    for config, color in colors.items():
        for kind, style in (("context", "-"), ("prompt", "--")):
            points = [
                (row["tokens"], *value(row))
                for row in rows
                if row["config"] == config and row["kind"] == kind and value(row) is not None
            ]
            if not points:
                continue
            x, y, low, high = zip(*sorted(points))
            drawn += x
            ax.errorbar(
                x, y, [low, high], color=color, linestyle=style, marker="o", markersize=4,
                linewidth=1.4, capsize=2, label=config,
            )  # fmt: skip
    token_axis(ax, drawn)


def _spread(spread: dict | None) -> tuple[float, float, float] | None:
    """The median, and how far the extremes lie below and above it."""
    if spread is None:
        return None
    middle = spread["median"]
    return middle, middle - spread["min"], spread["max"] - middle


def needle_figure(record: dict) -> Figure:
    """For each configuration what was found, and the answer's log-probability, by place."""
    configs = [row["config"] for row in record["summary"]]
    contexts, depths = record["contexts"], sorted(record["depths"])
    columns = min(len(configs), 6)
    blocks = -(-len(configs) // columns)
    figure, axes = new_figure(
        1.2 + 1.75 * columns, 0.8 + 3.7 * blocks, columns, 2 * blocks, sharex=True, sharey=True
    )
    for ax in axes.flat:
        ax.set_visible(False)
    panels = (("found", "found", (0, 1), "share found"), ("log p", "logp", (-8, 0), "log p, nats"))
    for k, (title, key, limits, label) in enumerate(panels):
        images = []
        for i, config in enumerate(configs):
            block, column = divmod(i, columns)
            ax = axes[2 * block + k, column]
            ax.set_visible(True)
            ax.grid(False)
            grid = _means(record["cases"], config, contexts, depths, key)
            images.append(ax.imshow(
                grid, vmin=limits[0], vmax=limits[1], cmap="viridis", aspect="auto",
                interpolation="nearest",
            ))  # fmt: skip
            ax.set_title(f"{config}\n{title}" if k == 0 else title, fontsize=9)
            ax.set_xticks(range(len(contexts)), [_tokens(n) for n in contexts], rotation=45)
            ax.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
            if column == 0:
                ax.set_ylabel("depth")
        extend = "min" if k else "neither"
        bar = figure.colorbar(images[0], ax=axes[k::2, :], shrink=0.85, extend=extend)
        bar.set_label(label, color=INK, fontsize=9)
        bar.ax.tick_params(colors=INK, labelsize=8)
        bar.outline.set_edgecolor(GRID)
    return figure


def _means(
    cases: list[dict], config: str, contexts: list[int], depths: list[float], key: str
) -> list[list[float]]:
    """Means over kinds and repeats, by depth and context; NaN where no case was finished."""

    def mean(depth: float, context: int) -> float:
        values = [
            float(c["results"][config][key])
            for c in cases
            if c["context"] == context and c["depth"] == depth
        ]
        return sum(values) / len(values) if values else float("nan")

    return [[mean(depth, context) for context in contexts] for depth in depths]
