"""Figures of Sparse V: what share of V decode could skip, and what that could gain."""

from __future__ import annotations

import numpy as np

from mlx_turbokv.kernels.decode import n_splits
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import TILE

from . import figure, read, table

SHOWN = {"final": (32, 8, 1), "running": (32, 8, 1), "one_split": (32,)}
NAMES = {"final": "all tokens", "running": "met so far", "one_split": "met so far, one split"}


def _percent(share: float) -> str:
    """Two digits of a share, and not 0 for one that isn't."""
    if share == 0:
        return "0"
    if share < 1e-4:
        return "< 0.01 %"
    return f"{100 * share:.{2 if share < 0.1 else 0}f} %"


@figure
def sparse() -> dict[str, str]:
    """Shares of units of V that no query head of a group needs, and the gain that they bound."""
    dim = read("kernel_counters")["head_dim"]
    rows = sorted(read("sparse_values")["rows"], key=lambda row: row["n_ctx"])
    record, units = rows[-1], rows[-1]["units"]

    def shares(row: dict, kind: str, unit: int) -> np.ndarray:
        return np.array(row["by_layer"][kind])[:, units.index(unit)]

    cells = [
        [f"{row['n_ctx']:,}, {row['config']}",
         *(_percent(shares(row, kind, unit).mean()) for kind, of in SHOWN.items() for unit in of)]
        for row in rows
    ]  # fmt: skip
    head = [
        f"{NAMES[kind]}: " + (f"{unit} tokens" if unit > 1 else "a row")
        for kind, of in SHOWN.items() for unit in of
    ]  # fmt: skip
    longest = [row for row in rows if row["n_ctx"] == rows[-1]["n_ctx"]]
    final = max(longest, key=lambda row: shares(row, "final", 32).mean())
    met = max(longest, key=lambda row: shares(row, "running", 32).mean())
    most = {
        kind: float(shares(row, kind, 32).mean())
        for kind, row in (("final", final), ("running", met))
    }
    one_split = max(float(shares(row, "one_split", 32).mean()) for row in longest)
    parts = {}
    for pair in ("q8_0/turbo2", "turbo4/turbo3"):
        k, v = (KVFormat.parse(name).row_bytes(dim) for name in pair.split("/"))
        parts[pair] = v / (k + v)
    windows = ", ".join(
        f"{row['windows']} of {row['n_ctx']:,}" for row in {r["n_ctx"]: r for r in rows}.values()
    )
    return {
        "about": (
            f"{record['model']['name']} in {record['model']['dtype']}, "
            f"{longest[0]['heads'][0]} query and {longest[0]['heads'][1]} KV heads, windows of wikitext-2 "
            f"({windows} tokens; sha256 {record['text_sha256'][:12]}…), {rows[0]['queries']} queries from the "
            f"last eighth of each; {record['device']}, mlx {record['mlx']}"
        ),
        "threshold": f"{record['threshold']:.0e}".replace("e-0", "e-"),
        "table": table(["tokens, formats", *head], cells),
        "longest": f"{longest[0]['n_ctx']:,}",
        "splits": str(n_splits(-(-longest[0]["n_ctx"] // TILE), longest[0]["heads"][1])),
        "final": _percent(most["final"]),
        "final_layer": _percent(float(shares(final, "final", 32).max())),
        "running": _percent(most["running"]),
        "running_layer": _percent(max(float(shares(row, "running", 32).max()) for row in longest)),
        "one_split": _percent(one_split),
        "bytes": " and ".join(f"{_percent(part)} ({pair})" for pair, part in parts.items()),
        "saved_running": _percent(most["running"] * max(parts.values())),
        "saved_final": _percent(most["final"] * max(parts.values())),
        "saved_operations": _percent(most["final"] / 2),
        "command": ", ".join(f"`{c}`" for c in dict.fromkeys(row["command"] for row in rows)),
    }
