"""Runs a Python script under NVIDIA's profiler ncu and reads what it prints."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Sequence


def profiled(metrics: Sequence[str], script: Sequence[str], only: str | None = None) -> list[dict]:
    """One row for each launch and metric, as ncu names its columns, numbers in base units.

    Args:
        script: a Python file and its arguments.
        only: a regular expression for the names of the kernels to look at.

    Raises:
        RuntimeError: ncu or the script failed; the message ends as their output does.
    """
    # the card's clocks stay as they are
    command = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none"]
    command += ["--kernel-name", f"regex:.*{only}.*"] if only else []
    command += ["--metrics", ",".join(metrics), sys.executable, *script]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = parsed(done.stdout)
    if done.returncode or not rows:
        raise RuntimeError(f"ncu {' '.join(script)}: {(done.stdout + done.stderr)[-2000:]}")
    return rows


def parsed(output: str) -> list[dict]:
    """The rows of ncu's CSV, which stand among lines of its own and of the script."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return list(csv.DictReader(lines[first:]))


def short_name(kernel: str) -> str:
    """This project's kernels by their own names, others without arguments and templates."""
    own = re.search(r"turbokv_(pack|decode_partial|decode_merge|dequantize)", kernel)
    return own[1] if own else re.split(r"[(<]", kernel)[0].removeprefix("void ")
