"""Entries on their way to disk: of the same conversation only the newest is written."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from .checkpoints import n_common
from .identity import CacheKind

MOST_WAITING = 4
_CHUNK = 1 << 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """An entry on its way to disk, its arrays evaluated."""

    kind: CacheKind
    tokens: np.ndarray
    caches: list[Any]
    marks: dict[int, list[Any]]
    reach: int

    def continues(self, other: Job) -> bool:
        """Whether this is the same conversation, longer."""
        if self.kind.digest != other.kind.digest or len(self.tokens) < len(other.tokens):
            return False
        return n_common(self.tokens, other.tokens) == len(other.tokens)


class Writer:
    """Writes jobs in order, behind the caller.

    A waiting job that a new one continues is left out, and so is the oldest of more than
    MOST_WAITING: memory is not filled by a slow disk.

    Args:
        write: writes a job; what it raises is logged, and the next one is written.
    """

    def __init__(self, write: Callable[[Job], None]) -> None:
        self._write = write
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()
        self._ends = False
        self.skipped = 0
        self._thread = threading.Thread(target=self._run, name="prompt cache writer", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Have a job written."""
        with self._changed:
            if self._ends:
                return
            kept = [old for old in self._waiting if not job.continues(old)]
            if len(kept) >= MOST_WAITING:
                kept = kept[1 - MOST_WAITING :]
                self.skipped += 1
            self._waiting = deque([*kept, job])
            self._changed.notify_all()

    def waiting(self) -> list[Job]:
        """Jobs that are not written yet, the one that is being written included."""
        with self._changed:
            current = [] if self._current is None else [self._current]
            return [*current, *self._waiting]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all is written; whether it is."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and self._current is None, timeout
            )

    def close(self) -> None:
        """Write what is waiting, and end the thread."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ends)
                if not self._waiting:
                    return
                self._current = self._waiting.popleft()
            try:
                self._write(self._current)
            except Exception as error:  # a full disk, say: the server goes on without this entry
                logger.warning("A prompt cache was not written to disk (%s).", error)
                logger.debug("", exc_info=error)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()


def frozen(caches: list[Any]) -> list[Any]:
    """Copies whose arrays are evaluated and whole, for another thread to write."""
    states = tree_map(
        lambda x: mx.contiguous(x) if isinstance(x, mx.array) else x, [c.state for c in caches]
    )
    mx.eval(states)
    return [type(cache).from_state(state) for cache, state in zip(caches, states)]


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
