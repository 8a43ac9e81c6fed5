"""Files that are written whole or not at all, and files that are read."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "TURBOKV_CACHE_DIR"
_TRIAL_BYTES = 1 << 14


def cache_dir() -> Path:
    """TURBOKV_CACHE_DIR, or mlx_turbokv in the user's cache folder (XDG_CACHE_HOME)."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx_turbokv"


@contextmanager
def replacing(
    path: str | os.PathLike, prefix: str | None = None, suffix: str | None = None
) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the block succeeds.

    A symbolic link stays, and the file that it leads to is replaced. A file that exists keeps its
    mode; a new one gets what the umask leaves.

    Args:
        path: the file to write. It stays as it is if the block raises.
        prefix: of the temporary file's name; None takes the name of ``path``.
        suffix: of the temporary file's name; None takes that of ``path``.

    Raises:
        OSError: the folder cannot be written, or ``path`` exists and is no regular file.
    """
    target = Path(os.path.realpath(path))
    mode = None
    if os.path.lexists(target):
        mode = check_regular(target).st_mode & 0o777
    suffix = target.suffix if suffix is None else suffix
    name = f"{prefix or f'.{target.name}-'}{secrets.token_hex(4)}{suffix}"
    temporary = target.with_name(name)
    # 0o666 less the umask, as open() creates files
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        if mode is not None:  # nobody may read it meanwhile who could not read the old one
            os.chmod(temporary, mode | stat.S_IWUSR)
        yield temporary
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_can_write(path: str | os.PathLike) -> None:
    """Find out before a long run whether ``path`` can be written: a file beside it is tried.

    Raises:
        OSError: it is no regular file, its folder is missing or read-only, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target):
        check_regular(target)
    trial = target.with_name(f".{secrets.token_hex(4)}.trial")
    try:
        with trial.open("xb") as file:
            file.write(bytes(_TRIAL_BYTES))
    finally:
        trial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` in UTF-8; the old file stays whole until the new one is complete.

    Raises:
        OSError: the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data``; the old file stays whole until the new one is complete.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_regular(path: str | os.PathLike) -> os.stat_result:
    """What is known of a file. FIFOs and devices are refused: reading them may never end.

    Raises:
        OSError: there is none, or it is a folder, a FIFO, a socket or a device.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return found


def read_bytes(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    check_regular(path)
    return Path(path).read_bytes()


def read_text(path: str | os.PathLike) -> str:
    """The text of a regular file in UTF-8, without its byte order mark.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is not UTF-8.
    """
    return read_bytes(path).decode("utf-8-sig")


def parse_json(text: str | bytes, pairs: Callable[[list], Any] | None = None) -> Any:
    """What a JSON text says.

    Args:
        pairs: makes each object of its pairs; None: a dict.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
