#!/usr/bin/env python3
"""Times the kernels against MLX's fp16 attention and mlx-lm's caches, through the package.

    python scripts/bench_kernels.py --refcheck --out benchmarks/bench_kernels.json
    python scripts/bench_kernels.py --parts kv_bits --out benchmarks/bench_kv_bits.json
    python scripts/bench_kernels.py --parts lengths,rows --pairs turbo4/turbo3 --lengths 131072
    python scripts/bench_kernels.py --parts lengths,batches --against ../before --out turns.json

Variants take turns in one run. ``us`` is microseconds of a call, MLX's launches included, in a
chain in which each call's query is the last call's output, as layers follow one another;
``apart_us`` is the same call where none waits for another.

A chain is submitted as mlx-lm's generation submits tokens: in steps of STEP_CALLS calls, as many as
a model has layers, the next step while the GPU runs the last one. MLX's work on the CPU for a step
is hidden as far as the GPU's work takes as long; where it takes longer, ``us`` is the time of that
work (compare ``submit_us``). Building a call's graph in Python comes before and is timed apart, as
``build_us``.

``--against FOLDER`` times the package of another tree in turns with this one, in a process of its
own; a row's ``against`` has what it took, and ``against_over_this`` is the median over rounds of
its time over this tree's; ``unprotected_over_this`` is the same of a call without protected tokens
and one with them. Both trees record fp16: how far that is from 1 is what the machine drifts.

Kernels compile at their first call. ``--warm i/n`` only compiles, every n-th variant, so that
processes with a MLX_PTX_CACHE_DIR each can share the work; the run then gets all their files
(bench_against.py does so for another tree, whose files go to ``against`` in that folder).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx_turbokv  # noqa: E402 - before mlx.core, so that OpenBLAS is used

# isort: split
import bench_timing as timing
import mlx.core as mx
from bench_groups import LENGTHS, PAIRS, PARTS, Group, groups
from bench_sides import Here, Other, Turn, serve
from record import record, write

from mlx_turbokv.errors import InputError
from mlx_turbokv.kernels.backend import select_backend

WARM_TOKENS = 4096  # kernels do not depend on lengths


def bench(
    here: Here, index: int, rounds: int, refcheck: bool, copy_speed: float,
    other: Other | None = None,
) -> list[dict]:  # fmt: skip
    """One row a variant of a group; of both trees, whose turns alternate."""
    sides = [here] if other is None else [here, other]
    for side in sides:
        side.prepare(index)
    group, names = here.group, list(here.made)
    turns = [{name: [] for name in names} for _ in sides]
    for i in range(rounds):
        order = -1 if i % 2 else 1
        for name in names[::order]:
            for j, side in list(enumerate(sides))[::order]:
                turns[j][name].append(side.turn(name))
    rows = []
    for name in names:
        found = [
            figures(own, name, here.made[name].n_bytes, copy_speed, side if refcheck else None)
            for own, side in zip(turns, sides)
        ]
        row = {
            "part": group.part, "job": group.job, "tokens": group.tokens,
            "heads": list(group.heads), "head_dim": group.head_dim, "batch": group.batch,
            "queries": group.queries, "variant": name, "steps": here.steps[name], **found[0],
        }  # fmt: skip
        if name.endswith(" protected"):
            plain = turns[0][name.removesuffix(" protected")]
            row["unprotected_over_this"] = median_ratio(plain, turns[0][name])
        if other is not None:
            own, others = (t[name] for t in turns)
            row |= {"against": found[1], "against_over_this": median_ratio(others, own)}
        print(line(row), flush=True)
        rows.append(row)
    return rows


def median_ratio(others: list[Turn], own: list[Turn]) -> float:
    """The median over rounds of the time of one call over another's."""
    return round(median(a.chain.done / b.chain.done for a, b in zip(others, own)), 3)


def figures(
    turns: dict[str, list[Turn]], name: str, n_bytes: int, copy_speed: float,
    checked: Here | Other | None,
) -> dict:  # fmt: skip
    """What a tree's turns say of a variant, and its error, if that is ``checked``."""
    chain = [turn.chain for turn in turns[name]]
    times = [t.done for t in chain]
    t = median(times)
    found = {
        "us": round(t * 1e6, 2), "low_us": round(min(times) * 1e6, 2),
        "high_us": round(max(times) * 1e6, 2),
        "build_us": round(median(t.built for t in chain) * 1e6, 2),
        "submit_us": round(median(t.submitted for t in chain) * 1e6, 2),
        "bytes": n_bytes, "gb_per_s": round(n_bytes / t / 1e9, 1),
        "share_of_copy": round(n_bytes / t / copy_speed, 4),
    }  # fmt: skip
    if "fp16" in turns:
        found["fp16_over_this"] = round(median(u.chain.done for u in turns["fp16"]) / t, 3)
    apart = [turn.apart for turn in turns[name] if turn.apart is not None]
    if apart:
        found["apart_us"] = round(median(apart) * 1e6, 2)
    error = checked and checked.check(name)
    if error:
        found["error"], found["error_allowed"] = error
    return found


def line(row: dict) -> str:
    """A row as text."""
    heads = ",".join(map(str, row["heads"]))
    shape = f"{row['job']} {heads} D={row['head_dim']} n={row['tokens']}"
    shape += "".join(f" {k[0].upper()}={row[k]}" for k in ("batch", "queries") if row[k] > 1)
    apart = f", apart {row['apart_us']:.1f}" if "apart_us" in row else ""
    ratio = f", {row['fp16_over_this']:.2f}x fp16" if "fp16_over_this" in row else ""
    error = f", error {row['error']:.1e}" if "error" in row else ""
    against = ""
    if "against" in row:
        against = f"; against: {row['against']['us']:.1f} us, {row['against_over_this']:.3f}x"
    if "unprotected_over_this" in row:
        ratio += f", {row['unprotected_over_this']:.3f}x unprotected"
    return (
        f"{shape:34} {row['variant']:22} {row['us']:8.1f} us ({row['low_us']:.1f} to "
        f"{row['high_us']:.1f}{apart}, build {row['build_us']:.1f}, submit "
        f"{row['submit_us']:.1f}), {row['gb_per_s']:.0f} GB/s, "
        f"{row['share_of_copy']:.0%} of copying{ratio}{error}{against}"
    )


def wrong(row: dict) -> bool:
    """Whether an error of a row is above what is accepted."""
    sides = row, row.get("against", {})
    return any(not side.get("error", 0) <= side.get("error_allowed", 0) for side in sides)


def warm(wanted: list[Group], share: int, n_shares: int) -> int:
    """Compiles every n-th of the kernels that the groups need."""
    makes = {}
    for group in wanted:
        shape = group.job, group.heads, group.head_dim, group.batch, group.queries
        for name in group.make:
            makes[(*shape, min(group.tokens, WARM_TOKENS), name)] = group, name
    for group, name in list(makes.values())[share::n_shares]:
        start = time.perf_counter()
        variant = group.make[name](group.inputs(WARM_TOKENS))
        mx.eval(variant.call(0, variant.start()))
        print(f"{group.job} {group.heads} {name}: {time.perf_counter() - start:.1f} s", flush=True)
    return 0


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS[:-1]), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--pairs", default=",".join(PAIRS), help="K/V pairs, comma-separated")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--refcheck", action="store_true", help="compare with the reference")
    parser.add_argument("--warm", metavar="I/N", default=None, help="only compile, every n-th")
    parser.add_argument("--backend", default=None, help="default: TURBOKV_BACKEND, else auto")
    parser.add_argument("--against", type=Path, help="the folder of a tree to time in turns")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(words)
    backend = select_backend(select_backend(args.backend).name)  # by name: it must cover all
    lengths = tuple(int(n) for n in args.lengths.split(","))
    wanted = list(groups(args.parts.split(","), args.pairs.split(","), lengths, backend))
    if args.warm:
        return warm(wanted, *(int(i) for i in args.warm.split("/")))
    here, other = Here(wanted), None
    if args.serve:
        serve(here, {"mlx_turbokv": mlx_turbokv.__version__})
        return 0
    if args.against is not None:
        options = {"parts": args.parts, "pairs": args.pairs, "lengths": args.lengths}
        options["backend"] = backend.name
        try:
            other = Other(args.against, [f"--{key}={value}" for key, value in options.items()])
        except InputError as error:
            parser.error(str(error))
    from mlx_turbokv.kernels import tuned  # not in every tree that is timed

    speeds = timing.copy_speeds()
    copy_speed, rows = max(speeds.values()), []
    report = record(
        backend=backend.name, tuning=tuned.summary(backend.name), rounds=args.rounds,
        calls_a_step=timing.STEP_CALLS,
        copy_gb_per_s=round(copy_speed / 1e9, 1),
        copies_gb_per_s={name: round(speed / 1e9, 1) for name, speed in speeds.items()},
        **({} if other is None else {"against": other.about}), rows=rows,
    )  # fmt: skip
    print({k: v for k, v in report.items() if k != "rows"}, flush=True)
    for index in range(len(wanted)):
        rows += bench(here, index, args.rounds, args.refcheck, copy_speed, other)
        mx.clear_cache()
        write(args.out, report)  # after each group: an interrupted run keeps what it measured
    if other is not None:
        other.close()
    failed = [row for row in rows if wrong(row)]
    for row in failed:
        print(f"FAILED {line(row)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
