"""Figures of speed: decode attention on a GPU, the reference back-end on a CPU."""

from __future__ import annotations

from . import figure, read, table


@figure
def decode() -> str:
    """Decode attention on a GPU against MLX's fp16 attention, from one run."""
    record = read("bench_kernels")
    rows = [r for r in record["rows"] if r["heads"] == [32, 8]]
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    by = {(r["tokens"], r["variant"]): r for r in rows}
    lines = []
    for tokens in sorted({r["tokens"] for r in rows}):
        cells = [f"{tokens:,}"]
        for variant in variants:
            row = by[tokens, variant]
            ratio = "" if variant == "fp16" else f" ({row['fp16_over_this']:.2f}×)"
            cells.append(f"{row['us']:.1f}{ratio}")
        lines.append(cells)
    about = (
        f"{record['device']}, mlx {record['mlx']}: µs of one attention call of one query, "
        "32 query and 8 KV heads, head_dim 128; in brackets, how many times faster than MLX's "
        "fp16 attention in the same run. `rows` dequantises first and calls that attention. Building a call takes further time of the CPU: "
        f"{max(r['build_us'] for r in rows if 'rows' not in r['variant']):.0f} µs at most, and "
        f"{max(by[t, 'fp16']['build_us'] for t, _ in by):.0f} µs for fp16."
    )
    return "\n\n".join([about, table(["tokens", *variants], lines), f"`{record['command']}`"])


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
