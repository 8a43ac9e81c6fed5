"""Prompt caches on disk: one safetensors file an entry, and an index.

A file is written whole under another name, renamed, and only then entered in the index together
with a digest of its bytes. So whatever ends the process leaves the entries that were complete; a
file that the index does not name is removed at the next start, and one whose bytes have changed is
not used.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import files
from ..cache.file_checks import check_contents, check_kinds
from ..log import warn_once
from .checkpoints import Entry, held_back, n_common
from .folder import Folder
from .identity import CacheKind
from .index import Row
from .options import DEFAULTS
from .writer import Job, Writer, file_digest, frozen

FILE_VERSION = 1
logger = logging.getLogger(__name__)


@dataclass
class DiskCounts:
    """What a folder's entries came to since the start."""

    written: int = 0
    written_bytes: int = 0
    evictions: int = 0
    damaged: int = 0


class DiskCache:
    """Entries in a folder that outlive the process.

    ``find`` is called by the generation thread, and files are written by a thread of their own.

    Args:
        folder: made where it is missing, for its owner alone: it holds what users wrote.
        max_bytes: of all files; the least recently used go first.

    Raises:
        InputError: the folder cannot be used, or another server uses it.
    """

    def __init__(
        self, folder: str | os.PathLike[str], max_bytes: int = DEFAULTS["prompt_cache_disk"]
    ) -> None:
        self.max_bytes = max_bytes
        self.counts = DiskCounts()
        self.folder = Folder(folder)
        self._files = threading.Lock()  # one file is not removed while it is read
        self._index, self.counts.damaged = self.folder.open()
        self._said_for: set[str] = set()
        self._writer = Writer(self._write)

    def close(self) -> None:
        """Write what is waiting, and let the next server use the folder."""
        self._writer.close()
        self._index.close()
        self.folder.close()

    @property
    def totals(self) -> tuple[int, int]:
        """How many entries there are, and their bytes."""
        return self._index.totals()

    @property
    def waiting_bytes(self) -> int:
        """Bytes in memory that are still to be written."""
        return sum(cache.nbytes for job in self._writer.waiting() for cache in job.caches)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all that was offered is written; whether it is."""
        return self._writer.wait(timeout)

    def find(
        self,
        kind: CacheKind,
        tokens: np.ndarray,
        least: int,
        has_room: Callable[[int], bool] = lambda nbytes: True,
    ) -> Entry | None:
        """The entry that gives most of a prompt, if that is at least ``least`` tokens.

        A damaged one is removed, and the next best is taken.

        Args:
            has_room: whether as many bytes can be loaded.
        """
        try:
            return self._find(kind, tokens, least, has_room)
        except (OSError, sqlite3.Error, zlib.error, ValueError, TypeError) as error:
            warn_once(f"The prompt cache in {self.folder.path} cannot be read ({error}).")
            return None

    def _find(
        self, kind: CacheKind, tokens: np.ndarray, least: int, has_room: Callable[[int], bool]
    ) -> Entry | None:
        self._say_what_is_there(kind)
        rows = self._index.sharing(kind.digest, tokens)
        found = [(row.position(n_common(row.tokens, tokens[:-1])), row) for row in rows]
        for position, row in sorted(found, key=lambda x: (-x[0], len(x[1].tokens))):
            if position < least:
                return None
            if not has_room(row.nbytes):
                continue
            if (entry := self._read(kind, row)) is not None:
                self._index.touch(row.id)
                return entry
        return None

    def offer(self, kind: CacheKind, entry: Entry) -> None:
        """Have an entry written, behind whatever comes next.

        Its arrays are computed at once, in the thread that the caches belong to.
        """
        marks = {position: frozen(mark) for position, mark in entry.marks.items()}
        job = Job(kind, entry.tokens, frozen(entry.caches), marks, entry.reach())
        self._writer.put(job)

    def _say_what_is_there(self, kind: CacheKind) -> None:
        if kind.digest in self._said_for:
            return
        self._said_for.add(kind.digest)
        n, nbytes = self._index.totals(kind.digest)
        n_others = self._index.totals()[0] - n
        others = "" if not n_others else (
            f"; {n_others:,} of another model, policy or format version are not used"
        )  # fmt: skip
        logger.info(
            "Prompt cache on disk: %s holds %s entries of this model, %.2f GB%s.",
            self.folder.path, f"{n:,}", nbytes / 1e9, others,
        )  # fmt: skip

    def _read(self, kind: CacheKind, row: Row) -> Entry | None:
        """An entry's caches, if its file is what was written."""
        with self._files:
            if not self._index.holds(row.id):  # a longer one has taken its place meanwhile
                return None
            try:
                path = self.folder / row.file
                if (digest := file_digest(path)) != row.digest:
                    raise ValueError(f"its digest is {digest[:12]}, not {row.digest[:12]}")
                caches, marks = self._caches(path, kind, row)
            except (OSError, ValueError, KeyError, TypeError) as error:
                self._drop(row.id, row.file, " ".join(str(error).split()).rstrip(".")[:200])
                return None
        return Entry(row.tokens, caches, marks)

    def _caches(
        self, path: Path, kind: CacheKind, row: Row
    ) -> tuple[list[Any], dict[int, list[Any]]]:
        n, n_marked = len(kind.fresh), len(held_back(kind.fresh))
        held, metadata = files.read(path, n + n_marked * len(row.positions))
        if metadata.get("version") != str(FILE_VERSION) or metadata.get("model") != kind.digest:
            raise ValueError("it is of another version or model")
        caches = held[:n]
        check_kinds(caches, kind.fresh)
        check_contents(caches, kind.own, len(row.tokens))
        own = None if kind.own is None else held_back(kind.own)
        marks = {}
        for i, position in enumerate(row.positions):
            mark = held[n + i * n_marked : n + (i + 1) * n_marked]
            check_kinds(mark, held_back(kind.fresh))
            check_contents(mark, own, position)
            files.work_as(mark, held_back(kind.fresh))
            marks[position] = mark
        files.work_as(caches, kind.fresh)
        return caches, marks

    def _drop(self, id: int, file: str, why: str) -> None:
        """Remove an entry that cannot be used."""
        self.counts.damaged += 1
        logger.warning("The prompt cache entry %s is not used: %s.", file, why)
        self._index.remove(id)
        self.folder.remove(file)

    def _write(self, job: Job) -> None:
        """Write a file and enter it; the writer's thread."""
        marked = [leaf for position in sorted(job.marks) for leaf in job.marks[position]]
        nbytes = sum(cache.nbytes for cache in [*job.caches, *marked])
        if nbytes > self.max_bytes:
            warn_once(
                f"A prompt cache of {nbytes / 1e9:.2f} GB is not written: --prompt-cache-disk is "
                f"{self.max_bytes / 1e9:.2f} GB."
            )
            return
        replaced = self._replaced(job)
        self._make_room(nbytes, {row.id for row in replaced})
        file = self.folder.new_file()
        path = self.folder / file
        metadata = {
            "maker": "mlx_turbokv serve",
            "version": str(FILE_VERSION),
            "model": job.kind.digest,
            "positions": json.dumps(sorted(job.marks)),
        }
        files.save_prompt_cache(path, [*job.caches, *marked], metadata)
        size = path.stat().st_size
        row = Row(0, file, job.kind.digest, job.tokens, sorted(job.marks), job.reach, size,
                  file_digest(path))  # fmt: skip
        with self._files:
            self._index.add(row, [old.id for old in replaced])
            for old in replaced:
                self.folder.remove(old.file)
        self.counts.written += 1
        self.counts.written_bytes += size
        self._make_room(0, set())

    def _replaced(self, job: Job) -> list[Row]:
        """Entries that the new one continues, if it can be taken back to most of them."""
        new = Row(0, "", "", job.tokens, sorted(job.marks), job.reach, 0, "")
        found = []
        for row in self._index.sharing(job.kind.digest, job.tokens):
            n = len(row.tokens)
            if n_common(row.tokens, job.tokens) == n and 2 * new.position(n) >= n:
                found.append(row)
        return found

    def _make_room(self, nbytes: int, last: set[int]) -> None:
        """Evict until as many bytes can be added.

        Args:
            last: entries that go only if all others are gone.
        """
        held = self._index.by_use()
        total = sum(size for _, _, size in held)
        for id, file, size in sorted(held, key=lambda x: x[0] in last):
            if total + nbytes <= self.max_bytes:
                return
            with self._files:
                self._index.remove(id)
                self.folder.remove(file)
            total -= size
            self.counts.evictions += 1
