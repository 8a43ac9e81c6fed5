"""Figures of speed: the reference back-end on a CPU."""

from __future__ import annotations

from . import figure, read, table


@figure
def reference() -> str:
    """The reference back-end on a CPU."""
    record = read("reference_speed")
    rows = [
        [r["config"], f"{1 / r['decode_s']:.2f}", f"{r['decode_tps_ratio']:.2f}",
         f"{r['window_s']:.2f}", f"{r['window_time_ratio']:.2f}"]
        for r in record["rows"]
    ]  # fmt: skip
    about = (
        f"{record['device']}, two cores, mlx {record['mlx']}, OpenBLAS: the default model at "
        f"{record['tokens']:,} tokens, and a window of 512 tokens."
    )
    header = ["K/V", "decode tok/s", "of f16", "window s", "of f16"]
    return "\n\n".join([about, table(header, rows), f"`{record['command']}`"])
