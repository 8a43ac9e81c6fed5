"""The record that every benchmark file carries."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

from mlx_turbokv.evaluate.record import checkout_commit, command_line, environment

ROOT = Path(__file__).resolve().parents[1]
# in a tree that `git archive` made, the commit
ARCHIVED = "$Format:%h$"


def commit() -> str | None:
    """The commit of this checkout, with a plus where files differ from it, or of this archive."""
    return checkout_commit() or (None if ARCHIVED.startswith("$") else ARCHIVED)


def record(**results) -> dict:
    """Results with device, versions, commit and command."""
    about = {"command": command_line(), "commit": commit(), "date": date.today().isoformat()}
    return {**about, **environment(), **results}


def write(path: Path | None, report: dict) -> None:
    """Write a record as JSON; without a path nothing."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
