#!/usr/bin/env python3
"""Compiles the kernels for Apple GPUs with Mesa's compiler: registers, spills, occupancy, loops.

    python scripts/apple_kernels.py TOOLS --out benchmarks/apple_kernels.json
    python scripts/apple_kernels.py TOOLS --short --pattern rows4

TOOLS is a folder with ``agx.h`` (Metal's words as C++ for OpenCL), ``to_spirv.sh`` (from
``/agx/k/NAME.cl`` to ``/agx/k/NAME.spv``), ``agx_stats.c`` (compiles that with Mesa and prints
statistics) and ``setup.sh``, which makes a chroot with all of it in ``$AGX_HOME`` (/var/tmp/agx).
It runs on Linux, as root for the chroot.

The text of every variant that Metal's tuning uses is compiled as MLX generates it; nothing runs.
Results are kept by the hash of the text in ``$AGX_HOME/cache``, so a second run only compiles what
has changed. It is not Apple's compiler: see docs/apple.md.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote

from apple_variants import ATTENTION, SHORT_HEAD_DIMS, SHORT_PAIRS, Variant, variants
from metal_host.opencl import compiled_source, constants
from record import record, write
from tqdm import tqdm

from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate.tables import Table

from agx import Compiler  # isort: skip

PROCESSES = 2
HOME = "/var/tmp/agx"
# decode's loops, as constants of its text: tiles of a step; trips over K's dims, over an anchor's
# dims and over V's tokens; blocks whose anchors are computed at a time
LOOPS = ("Config::STEP", "Config::SPANS")
LOOPS += ("ceil_div(Config::K::DIM / 2, 4 * (LANES / Config::ANCHORS))",)
LOOPS += ("Config::STEP / Config::PARTS * Config::UNITS", "Config::ANCHORS")
COLUMNS = {
    "instructions": "instructions", "demand": "demand", "registers": "registers",
    "threads": "threads", "threads_a_core": "threads a core", "spills": "spills", "fills": "fills",
    "scratch_bytes": "scratch", "threadgroup_bytes": "threadgroup", "code_bytes": "code",
    "outer_loop_bytes": "outer loop", "inner_loop_bytes": "inner loop",
    "instructions_a_token": "a token",
}  # fmt: skip


def statistics(variant: Variant, compiler: Compiler) -> dict:
    """A row of the record: what the variant is, and the compiler's statistics."""
    launch = variant.launch
    x, y, z = launch.threadgroup
    found = compiler.statistics(compiled_source(launch.text, launch.name, x * y * z))
    row = {"variant": variant.name, "kernel": variant.kernel, "pair": variant.pair,
           "head_dim": variant.head_dim, "centred": variant.centred, "rows": variant.rows,
           "how": variant.how, "passes": launch.grid[2], "threads": x * y * z}  # fmt: skip
    if variant.kernel not in ATTENTION:
        del row["rows"], row["how"], row["passes"]
    loops = found.pop("loops", [])
    row.update(found)
    if not loops:
        return row
    outer = max(loops, key=lambda loop: loop["instructions"])
    inner = [loop for loop in loops if outer["at"] < loop["at"] < outer["at"] + outer["bytes"]]
    row["outer_loop_bytes"] = outer["bytes"]
    row["inner_loop_bytes"] = max((loop["bytes"] for loop in inner), default=outer["bytes"])
    if variant.kernel == "decode_partial":
        row["instructions_a_token"] = _a_token(variant, outer, inner)
    return row


def _a_token(variant: Variant, outer: dict, inner: list[dict]) -> int | None:
    """Instructions of one lane for a token and KV head, for all the query rows of the variant.

    Each of a SIMD group's 32 lanes executes a step's instructions for 32 tokens a tile. Branches
    count as taken, though a new maximum is rare, and the anchors of centred keys are computed for
    several steps at a time. None where the loops are not those of the text.
    """
    launch = variant.launch
    step, spans, turns, units, anchors = constants(launch.text, launch.name, LOOPS)
    trips = [float(spans)] * (spans > 1) + [turns * step / anchors] * variant.centred + [units]
    if len(trips) != len(inner):
        return None
    once = outer["instructions"] - sum(loop["instructions"] for loop in inner)
    looped = sum(n * loop["instructions"] for n, loop in zip(trips, inner))
    return int(launch.grid[2] * (once + looped) / step)


def rows_of(chosen: Iterable[Variant], compiler: Compiler) -> list[dict]:
    """A row for each variant, two compiled at a time."""
    chosen = list(chosen)
    with ThreadPoolExecutor(PROCESSES) as pool:
        made = pool.map(lambda variant: statistics(variant, compiler), chosen)
        return list(tqdm(made, total=len(chosen), unit="kernel", mininterval=2))


def table(rows: list[dict]) -> str:
    """The rows as aligned text."""
    lines = [
        [row["variant"], *([row["error"]] if "error" in row else map(str, _figures(row)))]
        for row in rows
    ]
    return Table(["", *COLUMNS.values()], lines).text()


def _figures(row: dict) -> list[object]:
    return ["–" if row.get(name) is None else row[name] for name in COLUMNS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tools", type=Path, metavar="TOOLS", help="the folder with the AGX tools")
    parser.add_argument("--short", action="store_true",
                        help=f"only {' and '.join(SHORT_PAIRS)} at head_dim 128")  # fmt: skip
    parser.add_argument("--pattern", default="", help="regular expression for names of variants")
    parser.add_argument("--out", type=Path, metavar="RECORD.json")
    args = parser.parse_args()
    if args.out and not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}.")
    try:
        pattern = re.compile(args.pattern)
    except re.error as error:
        parser.error(f"--pattern {args.pattern!r} is no regular expression: {error}.")
    try:
        compiler = Compiler(args.tools, Path(os.environ.get("AGX_HOME", HOME)))
    except InputError as error:
        parser.error(str(error))
    every = list(variants(SHORT_PAIRS, SHORT_HEAD_DIMS) if args.short else variants())
    chosen = [variant for variant in every if pattern.search(variant.name)]
    if not chosen:
        parser.error(f"--pattern {args.pattern!r} matches none of {len(every)} variants.")
    rows = rows_of(chosen, compiler)
    print(table(rows))
    words = ["python scripts/apple_kernels.py TOOLS", *(["--short"] if args.short else [])]
    words += [f"--pattern {quote(args.pattern)}"] if args.pattern else []
    words += [f"--out {args.out}"] if args.out else []
    about = {"command": " ".join(words), "compiler": f"Mesa {compiler.version}"}
    write(args.out, record(**about, rows=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
