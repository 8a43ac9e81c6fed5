#!/usr/bin/env python3
"""Counts the kernels that one layer's cache and attention launch in a decode step, on NVIDIA.

    python scripts/launches.py --out launches.json

Runs itself under ncu twice for each cache, with eight and with sixteen steps, and divides the
difference: what is launched once drops out. gpu_check_record.py takes what it writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ncu import profiled, short_name  # noqa: E402
from record import record  # noqa: E402

CACHES = ("f16", "q8_0/turbo2", "turbo4/turbo3")
STEPS = 8
N_TOKENS = 4096 + 40
SHAPE = (1, 8, 128)  # sequences, KV heads, head_dim
N_HEADS = 32


def decode_steps(name: str, steps: int) -> None:
    """What a layer does with K and V, ``steps`` tokens long, behind N_TOKENS of context."""
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    import mlx_turbokv  # noqa: I001: before mlx.core

    batch, n_kv_heads, dim = SHAPE
    cache = KVCache() if name == "f16" else mlx_turbokv.TurboKVCache(*name.split("/"))

    def rows(n_heads: int, n: int) -> mx.array:
        array = mx.ones((batch, n_heads, n, dim), mx.float16)
        mx.eval(array)
        return array

    cache.update_and_fetch(rows(n_kv_heads, N_TOKENS), rows(n_kv_heads, N_TOKENS))
    token, queries = rows(n_kv_heads, 1), rows(N_HEADS, 1)
    for _ in range(steps):
        keys, values = cache.update_and_fetch(token, token)
        mx.eval(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=dim**-0.5))


def launched(name: str, steps: int) -> Counter:
    """Kernels by name, of a run of its own."""
    script = [__file__, "--run", name, "--steps", str(steps)]
    rows = profiled(["gpu__time_duration.sum"], script)
    return Counter(short_name(row["Kernel Name"]) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.run:
        decode_steps(args.run, args.steps)
        return 0
    rows = []
    for name in CACHES:
        more, fewer = launched(name, 2 * STEPS), launched(name, STEPS)
        by_kernel = {k: n / STEPS for k, n in (more - fewer).items()}
        rows.append({"cache": name, "launches": sum(by_kernel.values()), "by_kernel": by_kernel})
        print(rows[-1], flush=True)
    added = max(row["launches"] - rows[0]["launches"] for row in rows[1:])
    report = record(tokens=N_TOKENS, shape=SHAPE, n_heads=N_HEADS, rows=rows, most_added=added)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if added <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
