"""The record that every benchmark file carries."""

from __future__ import annotations

import subprocess
from datetime import date
from pathlib import Path

from mlx_turbokv.evaluate.record import command_line, environment

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """The commit of this checkout, with a plus where files differ from it."""
    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def record(**results) -> dict:
    """Results with device, versions, commit and command."""
    about = {"command": command_line(), "commit": commit(), "date": date.today().isoformat()}
    return {**about, **environment(), **results}
