#!/usr/bin/env python3
"""Counts with NVIDIA's profiler ncu: launches of a decode step, and hardware counters.

    python scripts/ncu.py launches --out launches.json
    python scripts/ncu.py counters --out benchmarks/kernel_counters.json

``launches`` runs itself under ncu twice for each cache, with eight and with sixteen decode steps of
one layer, and divides the difference, so that what is launched once cancels. ``counters`` packs a
context, attends to it with one query and reads it back; counts are of whole launches, of `tokens`
times `n_kv_heads` rows of K and V.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import record, write

HEADS, HEAD_DIM = (32, 8), 128
PAIRS = ("q8_0/turbo2", "turbo4/turbo3")
STEPS, STEP_TOKENS = 8, 4096 + 40  # of launches; no row leaves the protected tail meanwhile
N_TOKENS = 131072  # of counters
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


def profiled(metrics: Sequence[str], script: Sequence[str], only: str | None = None) -> list[dict]:
    """One row for each launch and metric, as ncu names its columns, numbers in base units.

    Args:
        script: a Python file and its arguments.
        only: a regular expression for the names of the kernels.

    Raises:
        RuntimeError: ncu or the script failed; the message ends as their output does.
    """
    # the card's clocks stay as they are
    command = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none"]
    command += ["--kernel-name", f"regex:.*{only}.*"] if only else []
    command += ["--metrics", ",".join(metrics), sys.executable, *script]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = parsed(done.stdout)
    if done.returncode or not rows:
        raise RuntimeError(f"ncu {' '.join(script)}: {(done.stdout + done.stderr)[-2000:]}")
    return rows


def parsed(output: str) -> list[dict]:
    """The rows of ncu's CSV, which stand among lines of its own and of the script."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return list(csv.DictReader(lines[first:]))


def short_name(kernel: str) -> str:
    """This project's kernels by their own names, others without arguments and templates."""
    own = re.search(r"turbokv_(pack|dequantize|read_segments|decode_[a-z]+)", kernel)
    return own[1] if own else re.split(r"[(<]", kernel)[0].removeprefix("void ")


def decode_steps(name: str, steps: int) -> None:
    """Decode steps of one layer with STEP_TOKENS of context."""
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    import mlx_turbokv
    from mlx_turbokv.policy.protection import DEFAULT_PROTECTION

    pair, _, protected = name.partition(" ")
    options = asdict(DEFAULT_PROTECTION) if protected else {}
    cache = KVCache() if name == "f16" else mlx_turbokv.TurboKVCache(*pair.split("/"), **options)

    def rows(n_heads: int, n: int) -> mx.array:
        array = mx.ones((1, n_heads, n, HEAD_DIM), mx.float16)
        mx.eval(array)
        return array

    cache.update_and_fetch(rows(HEADS[1], STEP_TOKENS), rows(HEADS[1], STEP_TOKENS))
    token, queries = rows(HEADS[1], 1), rows(HEADS[0], 1)
    for _ in range(steps):
        keys, values = cache.update_and_fetch(token, token)
        mx.eval(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=HEAD_DIM**-0.5))


def each_kernel(pair: str, tokens: int) -> None:
    """Each kernel once."""
    import kernel_variants as variants
    import mlx.core as mx

    from mlx_turbokv.attention import dispatch
    from mlx_turbokv.kernels.backend import select_backend
    from mlx_turbokv.kernels.packed import PackedKV, empty_tiles

    backend = select_backend("cuda")
    x = variants.noise(HEADS, HEAD_DIM, tokens)
    layout = variants.layout_of(pair, HEAD_DIM)
    packed = PackedKV(layout, backend.pack(x.keys, x.values, layout), tokens, empty_tiles(), 0)
    mx.eval(dispatch.attention(x.queries, packed, HEAD_DIM**-0.5, backend=backend))
    mx.eval(variants.rows_of(packed, backend))


def launched(name: str, steps: int) -> Counter:
    """Kernels by name, of a run of its own."""
    script = [__file__, "launches", "--run", name, "--n", str(steps)]
    rows = profiled([METRICS["nanoseconds"]], script)
    return Counter(short_name(row["Kernel Name"]) for row in rows)


def counted(pair: str, tokens: int) -> list[dict]:
    """One row a kernel."""
    script = [__file__, "counters", "--run", pair, "--n", str(tokens)]
    names = {metric: name for name, metric in METRICS.items()}
    found: dict[str, dict] = {}
    for row in profiled(list(METRICS.values()), script, only="turbokv"):
        kernel, value = short_name(row["Kernel Name"]), row["Metric Value"].replace(",", "")
        if row["Metric Name"] in names and value not in ("", "n/a"):
            entry = found.setdefault(kernel, {"pair": pair, "kernel": kernel})
            entry[names[row["Metric Name"]]] = float(value)
    return list(found.values())


def launches() -> dict:
    """The record of launches by cache."""
    rows = []
    for name in ("f16", *PAIRS, f"{PAIRS[1]} protected"):
        more, fewer = launched(name, 2 * STEPS), launched(name, STEPS)
        by_kernel = {k: n / STEPS for k, n in (more - fewer).items()}
        rows.append({"cache": name, "launches": sum(by_kernel.values()), "by_kernel": by_kernel})
        print(rows[-1], flush=True)
    added = max(row["launches"] - rows[0]["launches"] for row in rows[1:])
    shape = (1, HEADS[1], HEAD_DIM)
    return record(tokens=STEP_TOKENS, shape=shape, n_heads=HEADS[0], rows=rows, most_added=added)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("launches", "counters"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, default=N_TOKENS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        (decode_steps if args.what == "launches" else each_kernel)(args.run, args.n)
        return 0
    if args.what == "launches":
        report = launches()
        write(args.out, report)
        return 0 if report["most_added"] <= 2 else 1
    rows = [row for pair in PAIRS for row in counted(pair, args.n)]
    print(*rows, sep="\n")
    write(
        args.out, record(tokens=args.n, heads=HEADS, head_dim=HEAD_DIM, metrics=METRICS, rows=rows)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
