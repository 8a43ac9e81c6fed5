#!/usr/bin/env python3
"""Hardware counters of the kernels on NVIDIA: instructions, registers, bytes, of one launch each.

    python scripts/kernel_counters.py --out benchmarks/kernel_counters.json

Runs itself under ncu once for each pair of formats: packs a context, attends to it with one query
and reads it back. Counts are of whole launches; `tokens` times `n_kv_heads` rows of K and V.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ncu import profiled, short_name  # noqa: E402
from record import record  # noqa: E402

PAIRS = ("q8_0/turbo2", "turbo4/turbo3")
N_TOKENS = 131072
HEADS, HEAD_DIM = (32, 8), 128
# name in the record: ncu's metric
METRICS = {
    "warp_instructions": "smsp__inst_executed.sum",
    "float32_operations": "smsp__sass_thread_inst_executed_op_fp32_pred_on.sum",
    "multiply_adds": "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum",
    "float16_operations": "smsp__sass_thread_inst_executed_op_fp16_pred_on.sum",
    "integer_operations": "smsp__sass_thread_inst_executed_op_integer_pred_on.sum",
    "conversions": "smsp__sass_thread_inst_executed_op_conversion_pred_on.sum",
    "shared_loads": "smsp__sass_inst_executed_op_shared_ld.sum",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "instructions_a_cycle": "sm__inst_executed.avg.per_cycle_active",
    "dram_bytes_read": "dram__bytes_read.sum",
    "dram_share": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block_static",
    "threads": "launch__block_size",
    "nanoseconds": "gpu__time_duration.sum",
}


def launch(pair: str, tokens: int) -> None:
    """Each kernel once."""
    import kernel_variants as variants
    import mlx.core as mx

    from mlx_turbokv.attention import dispatch
    from mlx_turbokv.kernels.backend import select_backend
    from mlx_turbokv.kernels.packed import PackedKV

    backend = select_backend("cuda")
    x = variants.noise(HEADS, HEAD_DIM, tokens)
    layout = variants.layout_of(pair, HEAD_DIM)
    body = backend.pack(x.keys, x.values, layout)
    packed = PackedKV(layout, body, tokens, None, 0)
    mx.eval(dispatch.attention(x.queries, packed, HEAD_DIM**-0.5, backend=backend))
    mx.eval(variants.rows_of(packed, backend))


def counted(pair: str, tokens: int) -> list[dict]:
    """One row a kernel."""
    script = [__file__, "--run", pair, "--tokens", str(tokens)]
    names = {metric: name for name, metric in METRICS.items()}
    found: dict[str, dict] = {}
    for row in profiled(list(METRICS.values()), script, only="turbokv"):
        kernel, value = short_name(row["Kernel Name"]), row["Metric Value"].replace(",", "")
        if row["Metric Name"] in names and value not in ("", "n/a"):
            entry = found.setdefault(kernel, {"pair": pair, "kernel": kernel})
            entry[names[row["Metric Name"]]] = float(value)
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", default=",".join(PAIRS), help="K/V pairs, comma-separated")
    parser.add_argument("--tokens", type=int, default=N_TOKENS)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.run:
        launch(args.run, args.tokens)
        return 0
    rows = []
    for pair in args.pairs.split(","):
        found = counted(pair, args.tokens)
        print(*found, sep="\n", flush=True)
        rows += found
    report = record(tokens=args.tokens, heads=HEADS, head_dim=HEAD_DIM, metrics=METRICS, rows=rows)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
