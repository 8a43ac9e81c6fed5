"""Rows of an earlier run of ``bench``, which goes on from them."""

from __future__ import annotations

import os

from ..errors import InputError
from .output import read_json

# Two runs that agree in these keys may share their rows.
_SETTINGS = (
    "model", "weights", "configs", "centred", "protected", "generation_tokens", "num_trials",
    "prefill_step_size", "batch_size", "seed", "environment",
)  # fmt: skip


def finished(rows: list[dict]) -> set[tuple[str, int]]:
    """The points at which no configuration failed; the others are measured again."""
    return {point_of(r) for r in rows} - {point_of(r) for r in rows if "error" in r}


def point_of(row: dict) -> tuple[str, int]:
    """Kind and tokens of the point that a row is of."""
    return row["kind"], row["tokens"]


def add_rows(record: dict, path: str | None, points: list) -> None:
    """Put the rows of an earlier run with the same settings into the record.

    Raises: InputError if the file holds another run.
    """
    if path is None or not os.path.exists(path):
        return
    found = read_json(path, record["what"])
    # records of before there were batches, and protected tokens
    found.setdefault("batch_size", 1)
    found.setdefault("protected", dict.fromkeys(found.get("configs", ())))
    differ = [key for key in _SETTINGS if found.get(key) != record[key]]
    if differ:
        raise InputError(
            f"{path} holds a run with other settings ({', '.join(differ)}); --no-resume starts "
            "anew."
        )
    record["rows"] = found["rows"]
    if {(p.kind, p.tokens) for p in points} <= finished(found["rows"]):
        # Nothing is measured now: the command and commit are those of the run that did.
        record |= {key: found[key] for key in ("command", "commit")}
