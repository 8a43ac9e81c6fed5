"""Output of the commands: status lines and progress on stderr, records as JSON, tables."""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import cache_dir, check_can_write, parse_json, read_text, write_bytes

KEPT = "kept"  # the folder, within the cache folder, of results that could not be written
_SECONDS = 0.5, 10.0  # between two lines of progress, on a terminal and elsewhere


class NotWrittenError(InputError):
    """A result that could not be written where it was wanted; the message says where it is kept.

    record: the result, if it is one.
    """

    record: Any = None


class InterruptedRunError(KeyboardInterrupt):
    """Ctrl-C in a run; the message says what becomes of what it had finished."""


def shorten(text: str, most: int = 400) -> str:
    """A text that a message quotes, cut where it is long."""
    return text if len(text) <= most else f"{text[:most]}…"


def print_status(text: str) -> None:
    """Print a line on stderr, so that stdout has the results alone."""
    print(text, file=sys.stderr)


def print_result(text: str, record: Any) -> None:
    """Print results; where that fails, keep the record.

    Raises: NotWrittenError: the disk that standard output goes to is full.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence_stdout()
        raise _kept("Standard output", error, "results.json", _json_bytes(record)) from error


def silence_stdout() -> None:
    """Send standard output nowhere: Python would flush it once more, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_writable(path: str | Path | None) -> None:
    """Check the path of a result before the run.

    Raises: InputError for a folder, or a file in a folder that cannot be written.
    """
    if path is None:
        return
    if not str(path):
        raise InputError("An empty name is not accepted: give a file in a folder that exists.")
    try:
        check_can_write(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): give a file in a folder that exists, "
            "on a disk with room."
        ) from error


def check_outputs(*paths: str | None) -> None:
    """Check the paths of several results before the run.

    Raises: InputError as ``check_writable``, or for one path given twice.
    """
    found: set[str] = set()
    for path in paths:
        check_writable(path)
        if path is not None and os.path.realpath(path) in found:
            raise InputError(f"{path} cannot take two results: give two names.")
        found |= {os.path.realpath(path)} if path is not None else set()


def check_folder(path: str | Path, option: str) -> None:
    """Make a folder of results, and check that files can be written there.

    Raises: InputError.
    """
    folder = Path(path)
    made: list[Path] = []
    try:
        if not str(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        for at in (*reversed(folder.parents), folder):
            if not at.exists():
                at.mkdir()
                made.append(at)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        check_can_write(folder / KEPT)
    except OSError as error:
        for at in reversed(made):
            at.rmdir()
        raise InputError(
            f"{option} {str(path)!r} cannot take files ({error.strerror}): give a folder that can "
            "be written, on a disk with room."
        ) from error


def write_result(path: str | Path, data: str | bytes) -> None:
    """Write a result; an interruption leaves the old file.

    Raises: NotWrittenError: it could not be written, and says where it is kept.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        write_bytes(path, data)
    except OSError as error:
        raise _kept(str(path), error, Path(path).name, data) from error


def _kept(wanted: str, error: OSError, name: str, data: bytes) -> NotWrittenError:
    """Keep what could not be written: in the cache folder, that of temporary files, or here."""
    said = f"{wanted} cannot be written ({error.strerror})"
    name = f"{_stamp()}-{name}"
    for folder in (lambda: cache_dir() / KEPT, lambda: Path(tempfile.gettempdir()), Path.cwd):
        try:
            path = folder() / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)
        except OSError:
            continue
        return NotWrittenError(f"{said}; the result is kept in {path}.")
    try:
        print_status(data.decode())
    except UnicodeDecodeError:
        return NotWrittenError(f"{said}, nor can any other file.")
    return NotWrittenError(f"{said}, nor can any other file: the result is printed above.")


def write_folder(folder: Path, write: Callable[[Path], None], record: Any) -> None:
    """Write several files of a result.

    Args:
        write: writes them into a folder.
        record: what is printed if they cannot be written.

    Raises: NotWrittenError: they could not be written, and where they are kept.
    """
    try:
        write(folder)
        return
    except (OSError, InputError) as error:
        cause = error
    said = str(cause).rstrip(".")
    other = cache_dir() / KEPT / f"{_stamp()}-{folder.name}"
    try:
        other.mkdir(parents=True)
        write(other)
        error = NotWrittenError(f"{said}; all files are kept in {other}.")
    except (OSError, InputError):
        error = NotWrittenError(f"{said}, nor can {other}: free some room and run it again.")
    error.record = record
    raise error from cause


def _stamp() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def write_json(path: str | Path, record: Any) -> None:
    """Write a record, as ``write_result``."""
    try:
        write_result(path, _json_bytes(record))
    except NotWrittenError as error:
        error.record = record
        raise


def try_write_json(path: str | Path, record: Any) -> None:
    """Write what a run has finished so far; where that fails, say so and go on."""
    try:
        write_bytes(path, _json_bytes(record))
    except OSError as error:
        print_status(
            f"Warning: {path} cannot be written ({error.strerror}); the run goes on, and tries "
            "again."
        )


def _json_bytes(record: Any) -> bytes:
    return f"{as_json(record)}\n".encode()


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
    """A progress bar on stderr: a line that redraws on a terminal, sparse lines elsewhere.

    Args:
        interrupted: what becomes of finished runs at Ctrl-C, in words.
    """

    def __init__(
        self,
        total: int = 1,
        unit: str = "run",
        interrupted: str = "the same command goes on where it stopped",
    ):
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self.interrupted = interrupted
        self.bar = tqdm(
            total=total, unit=unit, file=sys.stderr, mininterval=_SECONDS[not terminal],
            miniters=0, dynamic_ncols=terminal, leave=False,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, _: object) -> None:
        self.bar.close()
        if isinstance(value, KeyboardInterrupt):
            raise InterruptedRunError(self.interrupted) from value

    def __call__(self, done: int, total: int, name: str) -> None:
        self.bar.total = total
        self.bar.set_postfix_str(name, refresh=False)
        self.bar.update(done - self.bar.n)
