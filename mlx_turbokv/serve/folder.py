"""The folder of prompt caches on disk: one server's at a time, with an index and own files."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import sqlite3
from pathlib import Path

from ..errors import InputError, short
from ..files import check_can_write
from .index import Index

INDEX = "index.sqlite"
LOCK = "lock"
_ENTRY = re.compile(r"entry-[0-9a-f]{16}\.safetensors")
_HALF = re.compile(r"\.turbokv-.*\.safetensors")
logger = logging.getLogger(__name__)


class Folder:
    """A folder and the files in it that are the cache's.

    Args:
        path: made where it is missing, for its owner alone: it holds what users wrote.

    Raises:
        InputError: it cannot be used, or another server uses it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_can_write(self.path / INDEX)
            self._lock = open(self.path / LOCK, "w")  # noqa: SIM115
        except OSError as error:
            raise InputError(
                f"--prompt-cache-dir {str(path)!r} cannot be used ({error.strerror}): give a "
                "folder that can be written."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise InputError(
                f"--prompt-cache-dir {str(path)!r} is in use by another server: give each a "
                "folder of its own."
            ) from error

    def open(self) -> tuple[Index, int]:
        """The index, and how many of its entries were removed because their files are not whole.

        Files that a killed process left are removed, and with an index that is damaged all are.
        """
        try:
            index = Index(self.path / INDEX)
            try:
                return index, self._remove_strangers(index)
            except BaseException:
                index.close()
                raise
        except (
            sqlite3.Error,
            ValueError,
            TypeError,
        ) as error:  # an error's own text may be damaged too
            logger.warning(
                "The prompt cache's index in %s cannot be read (%s); the folder starts empty.",
                self.path, error,
            )  # fmt: skip
        for end in ("", "-wal", "-shm"):
            (self.path / f"{INDEX}{end}").unlink(missing_ok=True)
        index = Index(self.path / INDEX)
        return index, self._remove_strangers(index)

    def close(self) -> None:
        """Let the next server use it."""
        self._lock.close()

    def new_file(self) -> str:
        """A name that no file has."""
        return f"entry-{secrets.token_hex(8)}.safetensors"

    def __truediv__(self, file: str) -> Path:
        """An entry's file.

        Raises:
            ValueError: it is no entry's name: an index may hold anything.
        """
        if not isinstance(file, str) or not _ENTRY.fullmatch(file):
            raise ValueError(f"{short(file)} is no entry's file")
        return self.path / file

    def remove(self, file: str) -> None:
        """Remove an entry's file, if it is there."""
        (self / file).unlink(missing_ok=True)

    def _remove_strangers(self, index: Index) -> int:
        named = {file: (id, nbytes) for id, file, nbytes in index.by_use()}
        for path in self.path.iterdir():
            is_own = _ENTRY.fullmatch(path.name) or _HALF.fullmatch(path.name)
            if is_own and path.name not in named:
                path.unlink(missing_ok=True)
        n_removed = 0
        for file, (id, nbytes) in named.items():
            path = self / file
            if not path.is_file() or path.stat().st_size != nbytes:
                logger.warning("The prompt cache entry %s is missing or cut short.", path)
                index.remove(id)
                self.remove(file)
                n_removed += 1
        return n_removed
