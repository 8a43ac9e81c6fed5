"""Output of the commands: status lines and progress on stderr, records as JSON, tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import parse_json, read_text, write_text


def print_status(text: str) -> None:
    """Print a line on stderr, so that stdout has the results alone."""
    print(text, file=sys.stderr)


def check_writable(path: str | None) -> None:
    """Check the path of a result before the run.

    Raises: InputError for a folder, or a file in a folder that does not exist.
    """
    if path is None:
        return
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{path} cannot be written: give a file in a folder that exists.")


def write_json(path: str | Path, record: Any) -> None:
    """Write a record; an interruption leaves the old file."""
    write_text(path, as_json(record) + "\n")


def read_json(path: str | Path, what: str) -> dict:
    """A record that ``write_json`` wrote, whose ``what`` begins with this.

    Raises: InputError for another or an unreadable file.
    """
    try:
        record = parse_json(read_text(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError:
        raise InputError(f"{path} is not a JSON file.") from None
    if not isinstance(record, dict) or not str(record.get("what", "")).startswith(what):
        raise InputError(f"{path} is not a record of {what}.")
    return record


def as_json(record: Any) -> str:
    """The whole record."""
    return json.dumps(record, indent=1, ensure_ascii=False)


def format_record(record: dict, table: Callable[[dict], Any], output: str) -> str:
    """A record as ``output`` says: "json", "markdown" or "text".

    ``table`` makes the record's table: one of ``evaluate.tables``.
    """
    return as_json(record) if output == "json" else table(record).render(output)


class Progress:
    """A progress bar on stderr: a line that redraws on a terminal, sparse lines elsewhere."""

    def __init__(self, total: int = 1, unit: str = "run"):
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total, unit=unit, file=sys.stderr, mininterval=0.5 if terminal else 30,
            dynamic_ncols=terminal, leave=False,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, done: int, total: int, name: str) -> None:
        self.bar.total = total
        self.bar.set_postfix_str(name, refresh=False)
        self.bar.update(done - self.bar.n)
