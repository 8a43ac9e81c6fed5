"""All checks of a GPU side by side: what was not run is run by the same command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# stands in for python3: writes a record of one case a call, and says what it was called with
PYTHON = """#!{python}
import json, os, sys
from pathlib import Path

words = sys.argv[1:]
if words[0] == "-":
    exec(sys.stdin.read().replace("sys.argv", "words"))
    sys.exit()
out = Path(words[1 + words.index("--json" if "--json" in words else "--out")])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(out.name + "\\n")
left = ["a", "b", "c"]
if "--without" in words:
    for name in words[words.index("--without") + 1 : words.index("--out")]:
        (row,) = json.loads(Path(name).read_text())["kernels"]
        left.remove(row["case"])
out.write_text(json.dumps({{"kernels": [{{"case": left[0]}}], "not_run": left[1:]}}))
sys.exit(len(left) > 1)
"""
SANITIZER = """#!/bin/sh
if rm "$LOST" 2>/dev/null; then echo "Internal Sanitizer Error: a launch is lost"; fi
shift 2
exec "$@"
"""


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Runs the script; returns the records that it asked for."""
    for name, text in (("python3", PYTHON.format(python=sys.executable)),
                       ("compute-sanitizer", SANITIZER)):  # fmt: skip
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    environment["LOST"] = str(tmp_path / "lost")

    def run(seconds: int = 400) -> list[str]:
        calls.write_text("")
        command = [ROOT / "scripts/gpu_check_all.sh", tmp_path / "out", str(seconds), "2", "2"]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=60)
        return sorted(calls.read_text().split())

    return run


OTHERS = [f"doctor{name}.json" for name in ("0.0", "0.1", "1", "2")]
OTHERS += ["launches.json", "model.json"]


def cases(number: int) -> list[str]:
    return [f"{kind}{shard}.{number}.json" for kind in ("cases", "memcheck", "racecheck")
            for shard in range(2)]  # fmt: skip


def test_the_same_command_runs_what_is_missing(checked, tmp_path):
    assert checked() == sorted(cases(0) + OTHERS)
    assert checked() == cases(1)
    assert checked() == cases(2)
    assert checked() == []
    rows = [
        json.loads((tmp_path / f"out/memcheck1.{i}.json").read_text())["kernels"] for i in range(3)
    ]
    assert [row["case"] for (row,) in rows] == ["a", "b", "c"]
    assert (
        "1.01f * unbiased_scale"
        in (tmp_path / "out/compiled/tree1/metal/pack_quantize.h").read_text()
    )


def test_nothing_is_begun_that_would_not_end_in_time(checked):
    assert checked(30) == OTHERS


def test_cases_of_a_sanitizer_that_fails_itself_are_run_again(checked, tmp_path):
    (tmp_path / "lost").write_text("")
    calls = [name for name in checked() if "check" in name]
    assert len(calls) == 5 and len(set(calls)) == 4
    logs = [path.read_text() for path in (tmp_path / "out").glob("*check*.log")]
    assert len(logs) == 4 and not any("Internal Sanitizer Error" in log for log in logs)
