#!/usr/bin/env python3
"""Times the kernels against MLX's fp16 attention and mlx-lm's caches, through the package.

    python scripts/bench_kernels.py --refcheck --out benchmarks/bench_kernels.json
    python scripts/bench_kernels.py --parts kv_bits --out benchmarks/bench_kv_bits.json
    python scripts/bench_kernels.py --parts lengths,rows --pairs turbo4/turbo3 --lengths 131072

What is compared takes turns in one run. Times are microseconds of a call, MLX's launches included,
in a chain where each call's query is the last call's output, as layers follow one another;
``apart_us`` is the same call where none waits for another. What building a call's graph takes in
Python is given beside it: a model builds the next step's graph while the last one runs.

Kernels compile at their first call. ``--warm i/n`` does that and no more, for every n-th variant, so
that processes with a MLX_PTX_CACHE_DIR each can share the work; the run then gets all their files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx_turbokv  # noqa: E402, F401, I001: before mlx.core
import mlx.core as mx  # noqa: E402
import kernel_variants as variants  # noqa: E402
from record import record  # noqa: E402

from mlx_turbokv.kernels.backend import Backend, available_backends, select_backend  # noqa: E402

PAIRS = ("q8_0/turbo2", "turbo4/turbo3")
LENGTHS = (2048, 8192, 32768, 131072)
MOST_K, MOST_V = ("q8_0", "turbo6", "turbo4", "turbo3"), ("turbo4", "turbo3", "turbo2")
HEADS, HEAD_DIM = (32, 8), 128
SHAPES = (((28, 4), 128), ((40, 10), 128), ((9, 3), 64), ((16, 8), 256))
CENTRED_TOKENS = 32768
CHUNK_TOKENS = 2048  # a prefill's step
WARM_TOKENS = 4096  # kernels do not depend on lengths
# `rows` joins `lengths`: dequantising first, then MLX's own attention
PARTS = ("lengths", "rows", "pairs", "shapes", "centred", "pack", "dequantize", "kv_bits")
# a chain takes about so long, within so many calls
CHAIN_SECONDS, FEWEST_CALLS, MOST_CALLS = 8e-3, 8, 128
COPY_BYTES, COPIES = 2**30, 10


class Group(NamedTuple):
    """What takes turns: variants of one shape by name; ratios are against fp16, if it is there."""

    part: str
    job: str
    heads: tuple[int, int]
    head_dim: int
    tokens: int
    make: dict[str, Callable[[variants.Inputs], variants.Variant]]


def groups(parts, pairs, lengths, backend: Backend) -> Iterator[Group]:
    """What each part compares."""

    def attention(part: str, heads, dim: int, tokens: int, names) -> Group:
        make = {"fp16": variants.fp16_attention}
        for name in names:
            if name.startswith("kv_bits"):
                make[name] = partial(variants.kv_bits_attention, bits=int(name[-1]))
            else:
                pair, _, how = name.partition(" ")
                make[name] = partial(variants.packed_attention, pair, backend=backend, how=how)
        return Group(part, "decode", heads, dim, tokens, make)

    if backend.name == "reference":
        parts = set(parts) - {"rows", "dequantize"}
    if "lengths" in parts:
        rows = [f"{pair} rows" for pair in pairs] if "rows" in parts else []
        for n in lengths:
            yield attention("lengths", HEADS, HEAD_DIM, n, [*pairs, *rows])
    if "pairs" in parts:
        names = [f"{k}/{v}" for k in MOST_K for v in MOST_V]
        yield attention("pairs", HEADS, HEAD_DIM, max(lengths), names)
    if "shapes" in parts:
        for heads, dim in SHAPES:
            yield attention("shapes", heads, dim, max(lengths), pairs)
    if "centred" in parts:
        centred = [f"{pair} centred" for pair in pairs if pair.startswith("turbo")]
        names = [*pairs, *centred]
        yield attention("centred", HEADS, HEAD_DIM, min(CENTRED_TOKENS, max(lengths)), names)
    if "kv_bits" in parts:
        for n in lengths:
            yield attention("kv_bits", HEADS, HEAD_DIM, n, [*pairs, "kv_bits8", "kv_bits4"])
    if "pack" in parts:
        for tokens, job, packing in (
            (CHUNK_TOKENS, "pack", variants.pack_chunk),
            (1, "append", variants.pack_token),
        ):
            make = {pair: partial(packing, pair, backend=backend) for pair in pairs}
            make = {"fp16": variants.fp16_append, **make}
            yield Group("pack", job, HEADS, HEAD_DIM, tokens, make)
    if "dequantize" in parts:
        make = {pair: partial(variants.dequantized_rows, pair, backend=backend) for pair in pairs}
        n = min(CENTRED_TOKENS, max(lengths))
        yield Group("dequantize", "dequantize", HEADS, HEAD_DIM, n, make)


def timed(variant: variants.Variant, n_calls: int, chained: bool) -> tuple[float, float]:
    """Seconds of one call: to evaluate it, launches included, and to build its graph before."""
    last = variant.start()
    mx.eval(last)
    results = []
    begin = time.perf_counter()
    for i in range(n_calls):
        result = variant.call(i, last)
        if chained:
            last = result
        else:
            results.append(result)
    built = time.perf_counter()
    mx.eval(last if chained else results)
    return (time.perf_counter() - built) / n_calls, (built - begin) / n_calls


def calls_of(variant: variants.Variant) -> int:
    """How many calls make a chain of CHAIN_SECONDS; compiles what is not compiled yet."""
    timed(variant, FEWEST_CALLS, variant.chained)
    seconds, _ = timed(variant, FEWEST_CALLS, variant.chained)
    return max(FEWEST_CALLS, min(MOST_CALLS, round(CHAIN_SECONDS / seconds)))


def bench(group: Group, rounds: int, refcheck: bool, copy_speed: float) -> list[dict]:
    """One row a variant of the group."""
    inputs = variants.noise(group.heads, group.head_dim, group.tokens)
    made = {name: make(inputs) for name, make in group.make.items()}
    n_calls = {name: calls_of(variant) for name, variant in made.items()}
    chain = {name: [] for name in made}
    apart = {name: [] for name in made}
    for _ in range(rounds):
        for name, variant in made.items():
            chain[name].append(timed(variant, n_calls[name], variant.chained))
            if variant.chained and group.job == "decode":
                apart[name].append(timed(variant, n_calls[name], False)[0])
    times = {name: [evaluated for evaluated, _ in found] for name, found in chain.items()}
    rows = []
    for name, variant in made.items():
        t = median(times[name])
        row = {
            "part": group.part, "job": group.job, "tokens": group.tokens,
            "heads": list(group.heads), "head_dim": group.head_dim, "variant": name,
            "us": round(t * 1e6, 2), "low_us": round(min(times[name]) * 1e6, 2),
            "high_us": round(max(times[name]) * 1e6, 2),
            "build_us": round(median(built for _, built in chain[name]) * 1e6, 2),
            "calls": n_calls[name], "bytes": variant.n_bytes,
            "gb_per_s": round(variant.n_bytes / t / 1e9, 1),
            "share_of_copy": round(variant.n_bytes / t / copy_speed, 4),
        }  # fmt: skip
        if "fp16" in times:
            row["fp16_over_this"] = round(median(times["fp16"]) / t, 3)
        if apart[name]:
            row["apart_us"] = round(median(apart[name]) * 1e6, 2)
        if refcheck and variant.check:
            row["error"], row["error_allowed"] = variant.check()
        print(line(row), flush=True)
        rows.append(row)
    return rows


def line(row: dict) -> str:
    """A row for people."""
    shape = f"{row['job']} {row['heads'][0]},{row['heads'][1]} D={row['head_dim']} n={row['tokens']}"
    apart = f", apart {row['apart_us']:.1f}" if "apart_us" in row else ""
    ratio = f", {row['fp16_over_this']:.2f}x fp16" if "fp16_over_this" in row else ""
    error = f", error {row['error']:.1e}" if "error" in row else ""
    return (
        f"{shape:34} {row['variant']:22} {row['us']:8.1f} us ({row['low_us']:.1f} to "
        f"{row['high_us']:.1f}{apart}, build {row['build_us']:.1f}), {row['gb_per_s']:.0f} GB/s, "
        f"{row['share_of_copy']:.0%} of copying{ratio}{error}"
    )


def copy_speeds() -> dict[str, float]:
    """Bytes a second, read and written, of ways to copy a large array on this device.

    Each copy reads the last one's result, so that nothing but the end is waited for.
    """
    found = {}
    for name, dtype in (("uint8", mx.uint8), ("uint32", mx.uint32), ("float32", mx.float32)):
        x, one = mx.zeros((COPY_BYTES // dtype.size,), dtype), mx.array(1, dtype)
        mx.eval(x, one)
        times = []
        for _ in range(5):
            y = x
            start = time.perf_counter()
            for _ in range(COPIES):
                y = y + one
            mx.eval(y)
            times.append((time.perf_counter() - start) / COPIES)
        found[f"{name} + 1"] = 2 * x.nbytes / median(times)
        del x, y
        mx.clear_cache()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS[:-1]), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--pairs", default=",".join(PAIRS), help="K/V pairs, comma-separated")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--refcheck", action="store_true", help="compare results with the reference")
    parser.add_argument("--warm", metavar="I/N", default=None, help="compile a share of the kernels")
    parser.add_argument("--backend", default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    backend = select_backend(args.backend or available_backends()[0])
    lengths = tuple(int(n) for n in args.lengths.split(","))
    wanted = list(groups(args.parts.split(","), args.pairs.split(","), lengths, backend))
    if args.warm:
        return warm(wanted, *(int(i) for i in args.warm.split("/")))
    speeds = copy_speeds()
    copy_speed, rows = max(speeds.values()), []
    report = record(
        backend=backend.name, rounds=args.rounds, copy_gb_per_s=round(copy_speed / 1e9, 1),
        copies_gb_per_s={name: round(speed / 1e9, 1) for name, speed in speeds.items()}, rows=rows,
    )  # fmt: skip
    print({k: v for k, v in report.items() if k != "rows"}, flush=True)
    for group in wanted:
        rows += bench(group, args.rounds, args.refcheck, copy_speed)
        mx.clear_cache()
        if args.out:  # after each group, so that what is cut off keeps what it measured
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    wrong = [r for r in rows if not r.get("error", 0) <= r.get("error_allowed", 0)]
    for row in wrong:
        print(f"FAILED {line(row)}", file=sys.stderr)
    return 1 if wrong else 0


def warm(wanted: list[Group], share: int, n_shares: int) -> int:
    """Compiles every n-th of the kernels that the groups need."""
    makes = {(g.job, g.heads, g.head_dim, name): (g, make) for g in wanted for name, make in g.make.items()}
    for (*_, name), (group, make) in list(makes.items())[share::n_shares]:
        start = time.perf_counter()
        variant = make(variants.noise(group.heads, group.head_dim, min(group.tokens, WARM_TOKENS)))
        timed(variant, 2, variant.chained)
        print(f"{group.job} {group.heads} {name}: {time.perf_counter() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
