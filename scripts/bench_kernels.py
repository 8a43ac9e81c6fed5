#!/usr/bin/env python3
"""Times the kernels against MLX's fp16 attention and mlx-lm's caches, through the package.

    python scripts/bench_kernels.py --refcheck --out benchmarks/bench_kernels.json
    python scripts/bench_kernels.py --parts kv_bits --out benchmarks/bench_kv_bits.json
    python scripts/bench_kernels.py --parts lengths,rows --pairs turbo4/turbo3 --lengths 131072

Variants take turns in one run. ``us`` is microseconds of a call, MLX's launches included, in a
chain in which each call's query is the last call's output, as layers follow one another;
``apart_us`` is the same call where none waits for another.

A chain is submitted as mlx-lm's generation submits tokens: in steps of STEP_CALLS calls, as many as
a model has layers, the next step while the GPU runs the last one. MLX's work on the CPU for a step
is hidden as far as the GPU's work takes as long; where it takes longer, ``us`` is the time of that
work (compare ``submit_us``). Building a call's graph in Python comes before and is timed apart, as
``build_us``.

Kernels compile at their first call. ``--warm i/n`` only compiles, every n-th variant, so that
processes with a MLX_PTX_CACHE_DIR each can share the work; the run then gets all their files.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx_turbokv  # noqa: E402, F401 - before mlx.core, so that OpenBLAS is used

# isort: split
import kernel_variants as variants
import mlx.core as mx
from record import record, write

from mlx_turbokv.kernels.backend import Backend, select_backend

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
STEP_CALLS = 32
# the timed steps of a chain take about so long, within so many steps
CHAIN_SECONDS, FEWEST_STEPS, MOST_STEPS = 8e-3, 3, 16
COPY_BYTES, COPIES, COPY_STEPS = 2**30, 10, 5


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


class Times(NamedTuple):
    """Seconds of one call of a chain: until it is done, to build its graph, to submit it."""

    done: float
    built: float
    submitted: float


def run_steps(ends: list[Any]) -> tuple[list[float], float]:
    """Submit steps as mlx-lm's generation does: the next one, then wait for the last one.

    The first step runs alone, and nothing is submitted while the last one runs, so times are of the
    steps between: n steps give n - 2.

    Args:
        ends: results of each step, arrays or trees of them, not evaluated; emptied on the way, so
            that no result is held longer than needed.

    Returns: seconds of each step but the first and the last, and the CPU time that submitting
        took of this thread, of all steps together. Waiting is not in it.
    """
    cpu_time, done = 0.0, []
    for i, end in enumerate(ends):
        start = time.thread_time()
        mx.async_eval(end)
        cpu_time += time.thread_time() - start
        if i > 0:
            mx.eval(ends[i - 1])
            done.append(time.perf_counter())
            ends[i - 1] = None
    mx.eval(ends.pop())
    return [after - before for before, after in pairwise(done)], cpu_time


def chain_of(
    variant: variants.Variant, starts: list[Any], n_steps: int, chained: bool
) -> list[Any]:
    """What each step of a chain ends in, not evaluated: its last call's result, or all of them.

    Args:
        starts: what calls get for a last result: one for all steps, or one for each.
        chained: whether a call gets the last one's result; if not, all get the start.
    """
    ends, last = [], None
    for step in range(n_steps):
        if step < len(starts):
            last = starts[step]
        results = []
        for i in range(step * STEP_CALLS, (step + 1) * STEP_CALLS):
            results.append(variant.call(i, last))
            if chained:
                last = results.pop()
        ends.append(last if chained else results)
    return ends


def timed(variant: variants.Variant, n_steps: int, chained: bool) -> Times:
    """Times of a chain of ``n_steps`` timed steps, between a first and a last one."""
    n_steps += 2
    n_calls = n_steps * STEP_CALLS
    starts = [variant.start() for _ in range(n_steps if variant.in_place else 1)]
    mx.eval(starts)
    begin = time.perf_counter()
    ends = chain_of(variant, starts, n_steps, chained)
    built = time.perf_counter() - begin
    del starts
    steps, submitted = run_steps(ends)
    return Times(mean(steps) / STEP_CALLS, built / n_calls, submitted / n_calls)


def steps_of(variant: variants.Variant) -> int:
    """How many timed steps make a chain of CHAIN_SECONDS; compiles what is not compiled yet."""
    timed(variant, 1, variant.chained)
    seconds = STEP_CALLS * timed(variant, FEWEST_STEPS, variant.chained).done
    return max(FEWEST_STEPS, min(MOST_STEPS, round(CHAIN_SECONDS / seconds)))


def bench(group: Group, rounds: int, refcheck: bool, copy_speed: float) -> list[dict]:
    """One row a variant of the group."""
    inputs = variants.noise(group.heads, group.head_dim, group.tokens)
    made = {name: make(inputs) for name, make in group.make.items()}
    n_steps = {name: steps_of(variant) for name, variant in made.items()}
    chain = {name: [] for name in made}
    apart = {name: [] for name in made}
    for _ in range(rounds):
        for name, variant in made.items():
            chain[name].append(timed(variant, n_steps[name], variant.chained))
            if variant.chained and group.job == "decode":
                apart[name].append(timed(variant, n_steps[name], False).done)
    times = {name: [t.done for t in found] for name, found in chain.items()}
    rows = []
    for name, variant in made.items():
        t = median(times[name])
        row = {
            "part": group.part, "job": group.job, "tokens": group.tokens,
            "heads": list(group.heads), "head_dim": group.head_dim, "variant": name,
            "us": round(t * 1e6, 2), "low_us": round(min(times[name]) * 1e6, 2),
            "high_us": round(max(times[name]) * 1e6, 2),
            "build_us": round(median(t.built for t in chain[name]) * 1e6, 2),
            "submit_us": round(median(t.submitted for t in chain[name]) * 1e6, 2),
            "steps": n_steps[name], "bytes": variant.n_bytes,
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
    """A row as text."""
    heads = ",".join(map(str, row["heads"]))
    shape = f"{row['job']} {heads} D={row['head_dim']} n={row['tokens']}"
    apart = f", apart {row['apart_us']:.1f}" if "apart_us" in row else ""
    ratio = f", {row['fp16_over_this']:.2f}x fp16" if "fp16_over_this" in row else ""
    error = f", error {row['error']:.1e}" if "error" in row else ""
    return (
        f"{shape:34} {row['variant']:22} {row['us']:8.1f} us ({row['low_us']:.1f} to "
        f"{row['high_us']:.1f}{apart}, build {row['build_us']:.1f}, submit "
        f"{row['submit_us']:.1f}), {row['gb_per_s']:.0f} GB/s, "
        f"{row['share_of_copy']:.0%} of copying{ratio}{error}"
    )


def copy_speeds() -> dict[str, float]:
    """Bytes a second, read and written, of ways to copy a large array on this device.

    Each copy reads the last one's result; they are submitted as calls are.
    """
    found = {}
    for name, dtype in (("uint8", mx.uint8), ("uint32", mx.uint32), ("float32", mx.float32)):
        x, one = mx.zeros((COPY_BYTES // dtype.size,), dtype), mx.array(1, dtype)
        mx.eval(x, one)
        n_bytes, ends = 2 * COPIES * x.nbytes, []
        for _ in range(COPY_STEPS + 2):
            for _ in range(COPIES):
                x = x + one
            ends.append(x)
        del x
        found[f"{name} + 1"] = n_bytes / median(run_steps(ends)[0])
        mx.clear_cache()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS[:-1]), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--pairs", default=",".join(PAIRS), help="K/V pairs, comma-separated")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--refcheck", action="store_true", help="compare with the reference")
    parser.add_argument("--warm", metavar="I/N", default=None, help="only compile, every n-th")
    parser.add_argument("--backend", default=None, help="default: TURBOKV_BACKEND, else auto")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    backend = select_backend(select_backend(args.backend).name)  # by name: it must cover all
    lengths = tuple(int(n) for n in args.lengths.split(","))
    wanted = list(groups(args.parts.split(","), args.pairs.split(","), lengths, backend))
    if args.warm:
        return warm(wanted, *(int(i) for i in args.warm.split("/")))
    speeds = copy_speeds()
    copy_speed, rows = max(speeds.values()), []
    report = record(
        backend=backend.name, rounds=args.rounds, calls_a_step=STEP_CALLS,
        copy_gb_per_s=round(copy_speed / 1e9, 1),
        copies_gb_per_s={name: round(speed / 1e9, 1) for name, speed in speeds.items()}, rows=rows,
    )  # fmt: skip
    print({k: v for k, v in report.items() if k != "rows"}, flush=True)
    for group in wanted:
        rows += bench(group, args.rounds, args.refcheck, copy_speed)
        mx.clear_cache()
        write(args.out, report)  # after each group: an interrupted run keeps what it measured
    wrong = [r for r in rows if not r.get("error", 0) <= r.get("error_allowed", 0)]
    for row in wrong:
        print(f"FAILED {line(row)}", file=sys.stderr)
    return 1 if wrong else 0


def warm(wanted: list[Group], share: int, n_shares: int) -> int:
    """Compiles every n-th of the kernels that the groups need."""
    makes = {(g.job, g.heads, g.head_dim, name): (g, name) for g in wanted for name in g.make}
    for group, name in list(makes.values())[share::n_shares]:
        start, n = time.perf_counter(), min(group.tokens, WARM_TOKENS)
        variant = group.make[name](variants.noise(group.heads, group.head_dim, n))
        mx.eval(variant.call(0, variant.start()))
        print(f"{group.job} {group.heads} {name}: {time.perf_counter() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
