#!/usr/bin/env python3
"""Times decode attention over packed rows against MLX's fp16 attention and mlx-lm's kv_bits.

All variants run on the same inputs, interleaved; each call reads other buffers than the last, so
that nothing is found in a cache. Times are for one call, MLX's launches included; what building
its graph takes in Python is given beside it.

    python scripts/bench_kernels.py --out benchmarks/bench_kernels.json
    python scripts/bench_kernels.py --fast --pairs "turbo4/turbo3,turbo4/turbo3 centred"
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx.core as mx  # noqa: E402
from record import record  # noqa: E402

from mlx_turbokv.centre import Centre, Turning  # noqa: E402
from mlx_turbokv.formats import KVFormat  # noqa: E402
from mlx_turbokv.kernels import decode, dequantize, pack  # noqa: E402
from mlx_turbokv.kernels.backend import available_backends  # noqa: E402
from mlx_turbokv.kernels.packed import PackedKV  # noqa: E402
from mlx_turbokv.layout import KVLayout  # noqa: E402

PAIRS = ("q8_0/turbo2", "turbo4/turbo3")
LENGTHS = (2048, 8192, 32768, 131072)
ROTATED_BYTES = 120 * 2**20  # more than the largest cache of a card
CALLS = 24


def copies(bytes_each: int) -> int:
    """How many buffers it takes to outgrow the caches."""
    return max(2, min(CALLS, -(-ROTATED_BYTES // bytes_each)))


def packed_variant(pair: str, how: list[str], keys, values, queries, backend: str):
    """A callable over rotating packed buffers, and the bytes that one call reads."""
    k_format, v_format = (KVFormat.parse(name) for name in pair.split("/"))
    dim, n = keys.shape[-1], keys.shape[2]
    layout = KVLayout(k_format, v_format, dim, dim, "float16")
    centre = None
    if "centred" in how:
        turning = Turning.of_rope(dim, dim, False, 1e6)
        centre = Centre(mx.random.normal((keys.shape[1], dim)), turning, "random")
    first = pack.pack(keys, values, layout, centre=centre, backend=backend)
    bodies = [mx.array(first) for _ in range(copies(first.nbytes))]
    bodies = [body + mx.array(0, mx.uint32) for body in bodies]
    mx.eval(bodies)
    views = [PackedKV(layout, body, n, None, 0, centre) for body in bodies]
    scale = dim**-0.5

    def call(i: int):
        view = views[i % len(views)]
        if "rows" in how:
            return dequantize._through_rows(queries, view, scale, None, None, backend)
        return decode.decode(queries, view, scale, backend=backend)

    return call, first.nbytes


def sdpa_variant(keys, values, queries):
    """MLX's fp16 attention."""
    n_copies = copies(2 * keys.nbytes)
    pairs = [(keys + mx.array(0, keys.dtype), values + mx.array(0, keys.dtype)) for _ in range(n_copies)]
    mx.eval(pairs)
    scale = keys.shape[-1] ** -0.5

    def call(i: int):
        k, v = pairs[i % n_copies]
        return mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale)

    return call, 2 * keys.nbytes


def kv_bits_variant(keys, values, queries, bits: int):
    """mlx-lm's quantised attention, group 64."""
    from mlx_lm.models.base import quantized_scaled_dot_product_attention

    quantized = [mx.quantize(x, group_size=64, bits=bits) for x in (keys, values)]
    n_bytes = sum(part.nbytes for x in quantized for part in x)
    sets = []
    for _ in range(copies(n_bytes)):
        sets.append([tuple(part + mx.array(0, part.dtype) for part in x) for x in quantized])
    mx.eval(sets)
    scale = keys.shape[-1] ** -0.5

    def call(i: int):
        k, v = sets[i % len(sets)]
        return quantized_scaled_dot_product_attention(
            queries, k, v, scale=scale, mask=None, group_size=64, bits=bits
        )

    return call, n_bytes


def timed(call) -> tuple[float, float]:
    """Seconds for one call: to evaluate it, launches included, and to build its graph before.

    While a model runs, the next step's graph is built as the last one is evaluated.
    """
    start = time.perf_counter()
    calls = [call(i) for i in range(CALLS)]
    built = time.perf_counter()
    mx.eval(calls)
    return (time.perf_counter() - built) / CALLS, (built - start) / CALLS


def bench(n: int, heads: tuple[int, int], dim: int, names, backend: str, rounds: int) -> list[dict]:
    """All variants at one length, interleaved."""
    n_heads, n_kv_heads = heads
    mx.random.seed(0)
    keys, values = (mx.random.normal((1, n_kv_heads, n, dim)).astype(mx.float16) for _ in range(2))
    queries = mx.random.normal((1, n_heads, 1, dim)).astype(mx.float16)
    mx.eval(keys, values, queries)
    variants = {}
    for name in names:
        if name == "fp16":
            variants[name] = sdpa_variant(keys, values, queries)
        elif name.startswith("kv_bits"):
            variants[name] = kv_bits_variant(keys, values, queries, int(name[-1]))
        else:
            pair, *how = name.split()
            variants[name] = packed_variant(pair, how, keys, values, queries, backend)
    for call, _ in variants.values():
        timed(call)
    times = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (call, _) in variants.items():
            times[name].append(timed(call))
    base = median(t for t, _ in times["fp16"])
    rows = []
    for name, (_, n_bytes) in variants.items():
        evaluated, built = zip(*times[name])
        t = median(evaluated)
        rows.append(
            {
                "tokens": n, "heads": list(heads), "head_dim": dim, "variant": name,
                "us": round(t * 1e6, 2), "low_us": round(min(evaluated) * 1e6, 2),
                "high_us": round(max(evaluated) * 1e6, 2),
                "build_us": round(median(built) * 1e6, 2), "bytes": n_bytes,
                "gb_per_s": round(n_bytes / t / 1e9, 1), "fp16_over_this": round(base / t, 3),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    x = mx.zeros((1 << 30,), mx.uint8)
    one = mx.array(1, mx.uint8)
    mx.eval(x, x + one)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        mx.eval(x + one)
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default=",".join(PAIRS), help="K/V pairs, comma-separated; a pair may say centred")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--heads", default="32,8", help="query heads, KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fast", action="store_true", help="leave out kv_bits and rows")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    backend = available_backends()[0]
    if backend == "reference":
        print("no GPU back-end here", file=sys.stderr)
        return 1
    names = ["fp16", *args.pairs.split(",")]
    if not args.fast:
        names += [f"{pair} rows" for pair in args.pairs.split(",")] + ["kv_bits8", "kv_bits4"]
    heads = tuple(int(x) for x in args.heads.split(","))
    rows = []
    for n in (int(x) for x in args.lengths.split(",")):
        rows += bench(n, heads, args.head_dim, names, backend, args.rounds)
    report = record(backend=backend, copy_gb_per_s=round(copy_bandwidth() / 1e9, 1), rows=rows)
    print({k: v for k, v in report.items() if k != "rows"})
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
