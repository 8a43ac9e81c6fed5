#!/usr/bin/env python3
"""Puts what a machine's checks wrote together as one record, and says what failed or is missing.

    python scripts/gpu_check_record.py FOLDER --out benchmarks/gpu_check.json

The folder has records, and next to each its process's exit status (.rc) and output (.log):

    cases*.json       gpu_check.py --shard i/n: kernels against float64
    memcheck*.json    the same under compute-sanitizer, racecheck*.json too
    model.json        gpu_check.py --no-kernels --windows n
    doctor*.json      doctor --json, or doctor_part.py's; of a tree with a changed kernel also
                      `FILE.metal: what` (.txt)
    launches.json     ncu.py launches
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import mlx_turbokv  # noqa: E402, F401 - before mlx.core, so that OpenBLAS is used

# isort: split
from kernel_cases import ALL_CASES
from record import write
from segment_cases import CASES as SEGMENT_CASES

from mlx_turbokv.doctor.sources import ENTRIES
from mlx_turbokv.doctor.variants import variant_set
from mlx_turbokv.evaluate.record import command_line

ABOUT = ("commit", "mlx_turbokv", "mlx", "mlx_lm", "python", "system", "device", "backend")
CASE_NAMES = frozenset(str(case) for case in (*ALL_CASES, *SEGMENT_CASES))
TOOLS = ("memcheck", "racecheck")
LAUNCHES = ("tokens", "shape", "n_heads", "rows", "most_added")
# what a sanitizer says last of a process in which it found nothing
CLEAN = {
    "memcheck": re.compile(r"ERROR SUMMARY: 0 errors"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)"),
}
# its own failure, which says nothing of the cases
LOST = re.compile(r"Internal Sanitizer Error: ([^.\n]*)")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")


class Part:
    """One process: its record, exit status and output."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.record = json.loads(path.read_text(encoding="utf-8"))
        status = path.with_suffix(".rc")
        self.status = int(status.read_text()) if status.is_file() else None
        log = path.with_suffix(".log")
        self.log = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        changed = path.with_suffix(".txt")
        self.changed = changed.read_text(encoding="utf-8").strip() if changed.is_file() else None


def parts(folder: Path, pattern: str) -> list[Part]:
    """The processes whose records match a pattern."""
    return [Part(path) for path in sorted(folder.glob(pattern))]


def about(found: list[Part]) -> dict:
    """Versions and device, the same of all processes.

    Raises: ValueError where two differ.
    """
    same: dict = {}
    for part in found:
        for key in ABOUT:
            value = part.record.get(key)
            if value is not None and same.setdefault(key, value) != value:
                raise ValueError(f"{part.name} has {key} {value}, another part {same[key]}")
    return same


def shards(found: list[Part]) -> dict:
    """The cases that some processes ran, which they left out, and their failures.

    A case that this checkout does not have is a failure: the records are of other kernels' cases.
    """
    rows = [row for part in found for row in part.record["kernels"]]
    ran = [row["case"] for row in rows]
    failures = [failure for part in found for failure in part.record["failures"]]
    failures += [f"{case}: no case of this checkout" for case in ran if case not in CASE_NAMES]
    command = re.sub(r"--shard \d+/", "--shard i/", found[0].record["command"]) if found else None
    return {
        "command": command and re.sub(r" --out \S+| --without(?: [^-]\S*)+", "", command),
        "processes": len(found),
        "cases": len(set(ran)),
        "not_run": sorted(CASE_NAMES - set(ran)),
        "failures": failures,
        "rows": sorted(rows, key=lambda row: row["case"]),
    }


def sanitized(tool: str, found: list[Part]) -> dict:
    """What a sanitizer said of the processes; cases count where it found nothing alone."""
    clean = [part for part in found if CLEAN[tool].search(part.log)]
    result = shards(clean)
    del result["rows"]
    if result["command"]:
        result["command"] = f"compute-sanitizer --tool {tool} python {result['command']}"
    for part in found:
        line = (SUMMARY.findall(part.log) or ["no summary"])[-1]
        if not CLEAN[tool].search(line):
            lost = LOST.search(part.log)
            why = f" (the sanitizer's own: {lost[1].lower()})" if lost else ""
            result["failures"].append(f"{part.name}: {line}{why}")
    return {"tool": tool, **result}


def doctors(found: list[Part]) -> list[dict]:
    """Verdict, exit status and the kernels named, of a whole tree and of changed ones.

    Parts of one tree count as one: passed if all did.
    """
    trees: dict[str | None, list[Part]] = {}
    for part in found:
        trees.setdefault(part.changed, []).append(part)
    rows = []
    for changed, own in trees.items():
        failures = [failure for part in own for failure in part.record["failures"]]
        command = re.sub(r" --json \S+", "", own[0].record["command"])
        statuses = [part.status for part in own if part.status is not None]
        row = {
            "command": re.sub(r" \d+/(\d+)", r" i/\1", command),
            "changed": changed,
            "processes": len(own),
            "exit": max(statuses) if len(statuses) == len(own) else None,
            "passed": all(part.record["passed"] for part in own),
            "variants": sum(len(part.record["variants"]) for part in own),
            "named": sorted({kernel for f in failures for kernel in f["kernels"]}),
            "messages": sorted({f["message"].splitlines()[0] for f in failures})[:3],
        }
        rows.append(row)
    return rows


def wrong_doctors(rows: list[dict]) -> list[str]:
    """The tree must pass, with all of a set's variants; a changed one must fail with status 1 and
    name the changed file's kernel."""
    failures, whole = [], {len(variant_set(which)) for which in ("quick", "default", "full")}
    for row in rows:
        good = row["passed"] and row["exit"] == 0 and row["variants"] in whole
        if row["changed"] is not None:
            kernel = ENTRIES[row["changed"].split(":")[0]]
            good = not row["passed"] and row["exit"] == 1 and kernel in row["named"]
        if not good:
            failures.append(f"doctor, {row['changed'] or 'nothing changed'}: {row}")
    return failures


def gather(folder: Path) -> tuple[dict, list[str]]:
    """The record of a folder, and what failed or is missing."""
    names = ("cases", *TOOLS, "doctor", "model", "launches")
    found = {name: parts(folder, f"{name}*.json") for name in names}
    everything = [part for some in found.values() for part in some]
    dates = sorted({part.record["date"] for part in everything if "date" in part.record})
    report: dict = {"command": command_line(), "date": dates[-1] if dates else None}
    report |= {**about(everything), "kernels": shards(found["cases"])}
    report["sanitizer"] = [sanitized(tool, found[tool]) for tool in TOOLS]
    report["doctor"] = doctors(found["doctor"])
    cases = (report["kernels"], *report["sanitizer"])
    failures = [failure for part in cases for failure in part["failures"]]
    failures += wrong_doctors(report["doctor"])
    failures += [
        f"{part.get('tool', 'kernels')}: {len(part['not_run'])} cases not run"
        for part in cases if part["not_run"]
    ]  # fmt: skip
    for name, keys in (("model", ("model",)), ("launches", LAUNCHES)):
        if not found[name]:
            failures.append(f"{name}: not run")
            continue
        record = found[name][0].record
        kept = {key: record[key] for key in keys}
        report[name] = {"command": record["command"], **kept.get("model", kept)}
        failures += record.get("failures", [])
    if {row["changed"] is None for row in report["doctor"]} != {True, False}:
        failures.append("doctor: not run on a whole tree and on a changed one")
    return report, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    try:
        report, failures = gather(args.folder)
    except ValueError as error:
        sys.exit(f"{args.folder}: {error}.")
    report["failures"] = failures
    write(args.out, report)
    for failure in failures:
        print("FAILED", failure, file=sys.stderr)
    counts = [f"{s['tool']} {s['cases']}" for s in report["sanitizer"]]
    print(f"{report['kernels']['cases']} cases, {', '.join(counts)} of {len(CASE_NAMES)}; "
          f"{len(failures)} failures or gaps")  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
