"""The index of a prompt cache folder: SQLite, of Python's own, with a write-ahead log."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 128  # tokens whose hash is indexed together with that of all before them
MOST_CANDIDATES = 32
_HASHES_AT_ONCE = 500
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, model TEXT NOT NULL,
    tokens BLOB NOT NULL, n_tokens INTEGER NOT NULL, positions TEXT NOT NULL,
    reach INTEGER NOT NULL, nbytes INTEGER NOT NULL, digest TEXT NOT NULL, used INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS blocks (
    hash INTEGER NOT NULL, n INTEGER NOT NULL,
    entry INTEGER NOT NULL REFERENCES entries(id) ON DELETE CASCADE,
    PRIMARY KEY (hash, entry)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blocks_of_entry ON blocks(entry);
"""
_COLUMNS = "id, file, model, tokens, positions, reach, nbytes, digest"


class Row(NamedTuple):
    """An entry of the index.

    file: its name in the folder.
    model: digest of a ``CacheKind``.
    positions: to which its caches can be taken back besides the end.
    reach: how many tokens can be taken back from the end.
    nbytes, digest: of the file.
    """

    id: int
    file: str
    model: str
    tokens: np.ndarray
    positions: list[int]
    reach: int
    nbytes: int
    digest: str

    def position(self, n_common: int) -> int:
        """The last position up to ``n_common`` that the entry can give; 0: none."""
        n = len(self.tokens)
        if n_common >= n:
            return n
        if 0 < n_common >= n - self.reach:
            return n_common
        return max((p for p in self.positions if p <= n_common), default=0)


class Index:
    """The entries of a folder.

    Args:
        path: of the database, made where it is missing.

    Raises:
        sqlite3.Error, ValueError: it cannot be opened, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.executescript(_SCHEMA)
            self._db.execute(f"SELECT {_COLUMNS} FROM entries LIMIT 1").fetchall()
            # all pages are read; SQLite 3.40's quick_check finds fault with good tables
            self._db.execute("SELECT SUM(hash % 2), SUM(n), SUM(entry) FROM blocks").fetchall()
            self._db.execute("SELECT SUM(LENGTH(tokens)), SUM(id) FROM entries").fetchall()
            self.by_use()
        except (sqlite3.Error, ValueError):  # an error's own text may be damaged too
            self._db.close()
            raise

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def add(self, row: Row, replaced: list[int]) -> None:
        """Add an entry, and remove those that it replaces, in one transaction."""
        hashes = block_hashes(row.model, row.tokens)
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM entries WHERE id = ?", [(x,) for x in replaced])
            added = self._db.execute(
                "INSERT INTO entries (file, model, tokens, n_tokens, positions, reach, nbytes, "
                "digest, used) VALUES (?, ?, ?, ?, ?, ?, ?, ?, "
                "(SELECT COALESCE(MAX(used), 0) + 1 FROM entries))",
                (row.file, row.model, _packed(row.tokens), len(row.tokens),
                 json.dumps(row.positions), row.reach, row.nbytes, row.digest),
            ).lastrowid  # fmt: skip
            self._db.executemany(
                "INSERT OR IGNORE INTO blocks (hash, n, entry) VALUES (?, ?, ?)",
                [(hash, (i + 1) * BLOCK, added) for i, hash in enumerate(hashes)],
            )

    def sharing(self, model: str, tokens: np.ndarray) -> list[Row]:
        """Entries that share at least a block of first tokens, those that share most first."""
        hashes = block_hashes(model, tokens)
        shared: dict[int, int] = {}
        with self._lock:
            for i in range(0, len(hashes), _HASHES_AT_ONCE):
                some = hashes[i : i + _HASHES_AT_ONCE]
                marks = ",".join("?" * len(some))
                for entry, n in self._db.execute(
                    f"SELECT entry, MAX(n) FROM blocks WHERE hash IN ({marks}) GROUP BY entry", some
                ):
                    shared[entry] = max(n, shared.get(entry, 0))
            best = sorted(shared, key=lambda entry: -shared[entry])[:MOST_CANDIDATES]
            rows = [self._get(entry) for entry in best]
        return [row for row in rows if row is not None and row.model == model]

    def touch(self, entry: int) -> None:
        """Make an entry the most recently used one."""
        with self._lock:
            self._db.execute(
                "UPDATE entries SET used = (SELECT MAX(used) + 1 FROM entries) WHERE id = ?",
                (entry,),
            )

    def holds(self, entry: int) -> bool:
        """Whether there is such an entry."""
        with self._lock:
            query = "SELECT 1 FROM entries WHERE id = ?"
            return self._db.execute(query, (entry,)).fetchone() is not None

    def remove(self, entry: int) -> None:
        """Remove an entry."""
        with self._lock:
            self._db.execute("DELETE FROM entries WHERE id = ?", (entry,))

    def by_use(self) -> list[tuple[int, str, int]]:
        """(id, file, bytes) of all entries, the least recently used first."""
        with self._lock:
            return self._db.execute("SELECT id, file, nbytes FROM entries ORDER BY used").fetchall()

    def totals(self, model: str | None = None) -> tuple[int, int]:
        """How many entries there are, and their bytes; of a model, or of all."""
        where, values = ("", ()) if model is None else (" WHERE model = ?", (model,))
        query = f"SELECT COUNT(*), COALESCE(SUM(nbytes), 0) FROM entries{where}"
        with self._lock:
            n, nbytes = self._db.execute(query, values).fetchone()
        return n, nbytes

    def _get(self, entry: int) -> Row | None:
        found = self._db.execute(
            f"SELECT {_COLUMNS} FROM entries WHERE id = ?", (entry,)
        ).fetchone()
        if found is None:
            return None
        id, file, model, tokens, positions, reach, nbytes, digest = found
        return Row(id, file, model, _unpacked(tokens), json.loads(positions), reach, nbytes, digest)


def block_hashes(model: str, tokens: np.ndarray) -> list[int]:
    """For each whole block of tokens, a hash of the model and of all tokens up to its end."""
    running = hashlib.blake2b(model.encode(), digest_size=8)
    found = []
    for i in range(0, len(tokens) - BLOCK + 1, BLOCK):
        running.update(tokens[i : i + BLOCK].astype("<i8").tobytes())
        found.append(int.from_bytes(running.copy().digest(), "little", signed=True))
    return found


def _packed(tokens: np.ndarray) -> bytes:
    return zlib.compress(tokens.astype("<i8").tobytes(), 1)


def _unpacked(data: bytes) -> np.ndarray:
    return np.frombuffer(zlib.decompress(data), "<i8").astype(np.int64)
