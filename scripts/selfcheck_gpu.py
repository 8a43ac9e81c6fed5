#!/usr/bin/env python3
"""Tries the kernels' self-check on this machine's GPU: its times, and whether it refuses faults.

    python scripts/selfcheck_gpu.py --out selfcheck.json
    python scripts/selfcheck_gpu.py --starts 5 --model MODEL --out selfcheck.json

Each kernel is checked twice: the first time compiles it. Then faults are planted in the text, one
at a time: `auto` must go on with the reference and say so in one sentence, and the back-end asked
for by name must refuse. ``--starts N`` also starts ``generate`` N times each without the check,
with nothing remembered and with all remembered; and, since starts vary by more than that, N
processes that time nothing but the check of those kernels, all of which are remembered.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx_turbokv  # noqa: E402, F401 - before mlx.core, so that OpenBLAS is used

# isort: split
import mlx.core as mx
from record import ROOT, record, write

from mlx_turbokv import log
from mlx_turbokv.errors import InputError
from mlx_turbokv.kernels import (
    assemble,
    backend,
    decode_launch,
    dequantize,
    pack,
    reference,
    segment_rows,
    selfcheck,
    trust,
    tuning,
)
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.kernels.segments import SegmentedKV
from mlx_turbokv.kernels.trust import Kernel
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout, protected_layout

PAIRS = (("q8_0", "turbo2", False), ("turbo4", "turbo3", False), ("turbo4", "turbo3", True))
HEAD_DIM = 128
LAYOUT = KVLayout(KVFormat.parse("q8_0"), KVFormat.parse("turbo2"), 64, 64, "float16")


class Fault(NamedTuple):
    """What is changed in the text of a kernel, and the launch that runs it.

    Args:
        said: a part of the sentence that says what is wrong.
    """

    file: str
    old: str
    new: str
    launch: str
    said: str


_STOP = "\n#error no such thing\n"
FAULTS = (
    Fault("pack.metal", r"old\[i\] & \(\(1u << word\.kept\) - 1u\)", "old[i]", "pack", "differs"),
    Fault("decode.metal", "LOWEST = -1e38f", "LOWEST = 1.0f", "decode", "attention is"),
    Fault("merge.metal", "float lane_top = LOWEST;", "float lane_top = 9.0f;", "decode long",
          "attention is"),
    Fault("dequantize.metal", r"v\.y \* scale", "v.y * v.y", "rows", "K rows"),
    Fault("segments.metal", r"larger\(body_end,", "larger(body_end + 1,", "segments", "K rows"),
    Fault("pack.metal", r"\Z", _STOP, "pack", "does not compile or run"),
    Fault("decode.metal", r"\Z", _STOP, "decode", "does not compile or run"),
)  # fmt: skip


def planted_text(fault: Fault, sound: Callable[[str, str], str]) -> Callable[[str, str], str]:
    """``assemble.header_text`` with the fault."""

    def header_text(file: str, name: str) -> str:
        text = sound(file, name)
        if file != fault.file:
            return text
        broken, n = re.subn(fault.old, fault.new, text)
        if not n:
            raise ValueError(f"{fault.old} does not occur in {file}")
        return broken

    return header_text


def forget() -> None:
    """What a new process does not know."""
    trust._found.clear()
    trust._machine.cache_clear()
    log._given.clear()
    for cached in (assemble._build, pack._launch, decode_launch.launch_for, decode_launch._call):
        cached.cache_clear()
    for cached in (dequantize._launch, dequantize._restoring, segment_rows._launch):
        cached.cache_clear()


def _rows(n: int, n_heads: int = 2) -> mx.array:
    return mx.random.normal((1, n_heads, n, 64), key=mx.random.key(n)).astype(mx.float16)


def _packed(n: int) -> PackedKV:
    tiles = reference.pack(_rows(n), _rows(n + 1)[:, :, :n], LAYOUT)
    return PackedKV(LAYOUT, empty_tiles(), 0, tiles, n)


def segmented() -> SegmentedKV:
    """Body and tail of one layout, and rows that are not packed."""
    fresh, tail = _rows(40), _packed(38).tail
    tiles, none = reference.pack(_rows(32), _rows(32), LAYOUT), empty_tiles()
    fine = protected_layout(LAYOUT)
    return SegmentedKV(
        LAYOUT, LAYOUT, fine, none, 0, 0, tiles, 32, tail, 32, 38, (32,), (0,), None, (fresh, fresh)
    )


def launched(name: str, own: backend.Backend) -> mx.array:
    """What a launch gives: pack, decode, decode long (in splits), rows or segments."""
    if name == "pack":
        return own.pack(_rows(3), _rows(3), LAYOUT)
    assert own.decode is not None and own.rotated_rows is not None
    if name in ("rows", "segments"):
        packed = _packed(70) if name == "rows" else segmented()
        return mx.concatenate(own.rotated_rows(packed, mx.float16, 0, 2))
    return own.decode(_rows(1, 6), _packed(4100 if name.endswith("long") else 70), 0.125)


AS_REFERENCE = backend.REFERENCE._replace(
    decode=reference.attention, rotated_rows=reference.rotated_rows
)


def refusal(fault: Fault, name: str) -> dict:
    """What `auto` and the back-end ``name`` make of a fault; ``refused`` if all is as it should."""
    sound = assemble.header_text
    assemble.header_text = planted_text(fault, sound)  # type: ignore[assignment]
    forget()
    begun = time.perf_counter()
    try:
        got = launched(fault.launch, backend.select_backend("auto"))
        same = mx.array_equal(got, launched(fault.launch, AS_REFERENCE)).item()
        said = trust.refused()
        try:
            mx.eval(launched(fault.launch, backend.select_backend(name)))
            forced = "not refused"
        except InputError as error:
            forced = str(error)
    finally:
        assemble.header_text = sound
        forget()
    fine = bool(same and len(said) == 1 and fault.said in said[0] and said[0] in forced)
    return {"file": fault.file, "new": fault.new.strip(), "refused": fine, "said": said,
            "forced": forced, "seconds": round(time.perf_counter() - begun, 3)}  # fmt: skip


def kernels(name: str) -> list[Kernel]:
    """Kernels of the recommended pairs, as a generation meets them."""
    found = []
    for k, v, centred in PAIRS:
        layout = KVLayout(KVFormat.parse(k), KVFormat.parse(v), HEAD_DIM, HEAD_DIM, "float16")
        for op, options in (
            ("pack", {}), ("decode", {"rows": 1, "whole": True, "heads": (4, 1)}),
            ("decode", {"rows": 4, "heads": (4, 1)}), ("dequantize", {}),
            ("segments", {"protected": True, "fresh": mx.float16}),
        ):  # fmt: skip
            cut = tuning.built_in(name) if op == "decode" else None
            found.append(Kernel(op, name, layout, mx.float16, centred, cut=cut, **options))
    return found


def timed(kernel: Kernel) -> dict:
    """Seconds of a kernel's check, with its compilation and without, and what it found."""
    seconds, problem = [], None
    for _ in range(2):
        begun = time.perf_counter()
        with trust.unchecked():
            problem = selfcheck.problem(kernel)
        seconds.append(round(time.perf_counter() - begun, 3))
    return {"kernel": str(kernel), "compiling": seconds[0], "again": seconds[1], "problem": problem}


def require_all(name: str) -> float:
    """Seconds that the check of the kernels takes in this process."""
    own = kernels(name)
    begun = time.perf_counter()
    for kernel in own:
        trust.require(kernel)
    return time.perf_counter() - begun


def requiring(n: int, name: str) -> list[float]:
    """The same of ``n`` new processes, after one that checked and remembered."""
    command = [sys.executable, __file__, "--require", "--backend", name]
    with tempfile.TemporaryDirectory() as folder:
        own = {"TURBOKV_CACHE_DIR": folder, trust.VARIABLE: "1"}
        said = [
            subprocess.run(
                command, env={**os.environ, **own}, check=True, capture_output=True, text=True
            ).stdout
            for _ in range(n + 1)
        ]
    return [float(seconds) for seconds in said[1:]]


def starts(n: int, model: str | None, name: str) -> dict[str, list[float]]:
    """Seconds that ``generate`` takes: without checks, checking, and with all remembered."""
    command = [sys.executable, "-m", "mlx_turbokv", "generate", "--backend", name]
    command += ["--max-tokens", "4", "--prompt", "Hello", *(["--model", model] if model else [])]
    command.append("--no-calibrate")  # a start that measures keys says nothing of the check
    found: dict[str, list[float]] = {"unchecked": [], "first": [], "remembered": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(n):
            for kind in found:
                if kind == "first":
                    (Path(folder) / trust.FILE_NAME).unlink(missing_ok=True)
                own = {"PYTHONPATH": str(ROOT), "TURBOKV_CACHE_DIR": folder}
                own[trust.VARIABLE] = "0" if kind == "unchecked" else "1"
                if "PYTHONPATH" in os.environ:
                    own["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
                begun = time.perf_counter()
                subprocess.run(
                    command, env={**os.environ, **own}, check=True, stdout=subprocess.DEVNULL
                )
                found[kind].append(round(time.perf_counter() - begun, 3))
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="metal or cuda; default: the best there is")
    parser.add_argument("--starts", type=int, default=0, help="of generate, of each kind")
    parser.add_argument("--model", help="of --starts; default: the default model")
    parser.add_argument("--require", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(words)
    name = backend.select_backend(args.backend).name
    if name == "reference":
        print("no GPU back-end here", file=sys.stderr)
        return 1
    if args.require:
        print(require_all(name))
        return 0
    os.environ[trust.VARIABLE] = "1"
    checks = []
    for kernel in kernels(name):
        checks.append(timed(kernel))
        print(checks[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TURBOKV_CACHE_DIR")
        os.environ["TURBOKV_CACHE_DIR"] = folder
        faults = []
        for fault in FAULTS:
            faults.append(refusal(fault, name))
            print(faults[-1], flush=True)
        os.environ.pop("TURBOKV_CACHE_DIR")
        if before is not None:
            os.environ["TURBOKV_CACHE_DIR"] = before
    report = record(backend=name, checks=checks, faults=faults)
    if args.starts:
        report["requiring"] = requiring(args.starts, name)
        print(f"remembered: {statistics.median(report['requiring']):.4f} s", flush=True)
        report["starts"] = starts(args.starts, args.model, name)
        print({kind: statistics.median(s) for kind, s in report["starts"].items()}, flush=True)
    write(args.out, report)
    bad = [c for c in checks if c["problem"]] + [f for f in faults if not f["refused"]]
    print(f"{len(checks)} kernels checked, {len(faults)} faults, {len(bad)} not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
