#!/usr/bin/env python3
"""Checks every kernel on this machine's GPU: against float64, then whole models, and records it.

    python scripts/gpu_check.py --shard 0/8 --out cases0.json
    compute-sanitizer --tool memcheck python scripts/gpu_check.py --shard 0/8 --out memcheck0.json
    python scripts/gpu_check.py --no-kernels --windows 16 --text wiki.test.raw --out model.json

gpu_check_record.py puts what such runs wrote together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TURBOKV_SELFCHECK", "0")  # the cases say more
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
# two back-ends are compared to the last bits of float32
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx_turbokv  # noqa: E402, F401 - before mlx.core, so that OpenBLAS is used

# isort: split
import mlx.core as mx
from kernel_cases import ALL_CASES, Case, run_case
from record import ROOT, record, write
from segment_cases import CASES as SEGMENT_CASES
from segment_cases import run_segment_case

from mlx_turbokv.kernels.backend import select_backend

SAMPLE = ROOT / "mlx_turbokv" / "evaluate" / "sample.txt"


def check_kernels(backend: str, cases, seconds: float) -> tuple[list[dict], list[str], list[str]]:
    """Run the cases until the time is up; returns results, what disagreed and what was not run."""
    results, failures = [], []
    start = time.perf_counter()
    for case in cases:
        if time.perf_counter() - start > seconds:
            break
        began = time.perf_counter()
        result = (run_case if isinstance(case, Case) else run_segment_case)(case, backend)
        result["seconds"] = round(time.perf_counter() - began, 2)
        results.append(result)
        if result["failures"]:
            failures += [f"{case}: {failure}" for failure in result["failures"]]
        print(result, flush=True)
    return results, failures, [str(case) for case in cases[len(results) :]]


def cases_of(records: list[Path]) -> set[str]:
    """The cases that were run for these records."""
    read = (json.loads(path.read_text(encoding="utf-8")) for path in records)
    return {row["case"] for record in read for row in record["kernels"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="metal or cuda; default: TURBOKV_BACKEND, else auto")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th case from i on")
    parser.add_argument("--without", type=Path, nargs="*", default=[], metavar="FILE",
                        help="leave out the cases of these records")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=400, help="time for the kernel cases")
    parser.add_argument("--model", default=None, help="a GGUF file or folder of the default model")
    parser.add_argument("--windows", type=int, default=0, help="perplexity windows of the model")
    parser.add_argument("--text", type=Path, default=SAMPLE, help="the text of those windows")
    parser.add_argument("--no-kernels", action="store_true", help="the model alone")
    parser.add_argument("--out", type=Path, default=None, help="where to write the JSON record")
    args = parser.parse_args()

    backend = select_backend(args.backend).name
    if backend == "reference":
        print("no GPU back-end here", file=sys.stderr)
        return 1
    shard, n_shards = (int(x) for x in args.shard.split("/"))
    cases = [] if args.no_kernels else [*ALL_CASES, *SEGMENT_CASES][shard::n_shards]
    elsewhere = cases_of(args.without)
    cases = [case for case in cases if str(case) not in elsewhere]
    results, failures, not_run = check_kernels(backend, cases, args.seconds)
    report = record(backend=backend, kernels=results, not_run=not_run)
    if args.windows:
        from model_check import compare_backends

        pair = (backend, "reference")
        report["model"], more = compare_backends(args.model, pair, args.windows, args.text)
        failures += more
    report["failures"] = failures
    write(args.out, report)
    for failure in failures:
        print("FAILED", failure, file=sys.stderr)
    worst = max((r["decode_of_bound"] for r in results), default=0)
    print(f"{len(results)} cases on {mx.default_device()}, {len(failures)} failures, "
          f"largest decode error {worst:.2f} of its bound")  # fmt: skip
    if not_run:
        print(f"out of time: {len(not_run)} cases were not run", file=sys.stderr)
    return 1 if failures or not_run else 0


if __name__ == "__main__":
    sys.exit(main())
