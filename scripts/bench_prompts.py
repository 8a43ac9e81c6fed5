#!/usr/bin/env python3
"""Puts runs of ``mlx_turbokv bench`` on this tree and on an earlier one together, as one record.

    python scripts/bench_prompts.py RUNS --commit be5c0a7 --before 16b0ee6 --out prompts.json

RUNS has the records (bench --json) of processes that took turns: now*.json of this tree,
before*.json of the earlier one. A row is a tree's configuration and length: the trials of each
process, and the median of all.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import write

from mlx_turbokv.evaluate.record import command_line

ABOUT = ("model", "weights", "prefill_step_size", "backend", "environment")


def gather(folder: Path, commits: dict[str, str]) -> dict:
    """The record of a folder.

    Raises: ValueError where a tree has no run, or two runs are not of the same model and machine.
    """
    about: dict = {}
    commands: dict[str, str] = {}
    rows: dict[tuple, dict] = {}
    for tree in commits:
        runs = sorted(folder.glob(f"{tree}*.json"))
        if not runs:
            raise ValueError(f"no {tree}*.json")
        for path in runs:
            run = json.loads(path.read_text(encoding="utf-8"))
            for key in ABOUT:
                if about.setdefault(key, run[key]) != run[key]:
                    raise ValueError(f"{path.name} has {key} {run[key]}, others {about[key]}")
            commands[tree] = run["command"].split(" --json ")[0]
            for row in run["rows"]:
                if row["kind"] == "prompt":
                    config, tokens = row["config"], row["tokens"]
                    protected = run.get("protected", {}).get(config)
                    found = {"tree": tree, "commit": commits[tree], "config": config,
                             "protected": protected, "tokens": tokens, "trials": []}  # fmt: skip
                    found = rows.setdefault((tree, config, tokens), found)
                    found["trials"].append(row["prompt_tps"]["trials"])
    for row in rows.values():
        row["median"] = median(tps for run in row["trials"] for tps in run)
    return {"command": command_line(), "commit": commits["now"], "runs": commands,
            **about.pop("environment"), **about, "rows": list(rows.values())}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="RUNS")
    parser.add_argument("--commit", required=True, help="of this tree")
    parser.add_argument("--before", required=True, help="the earlier commit")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    try:
        report = gather(args.folder, {"now": args.commit, "before": args.before})
    except ValueError as error:
        sys.exit(f"{args.folder}: {error}.")
    write(args.out, report)
    for row in report["rows"]:
        print(f"{row['tokens']:,} {row['config']}, {row['tree']}: {row['median']:,.0f} tok/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
