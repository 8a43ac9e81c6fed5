"""The prompt cache: caches of finished requests in memory, with those on disk behind them."""

from __future__ import annotations

import argparse
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..loading import distributed
from .checkpoints import Entry, held_back, n_common, only_grows, snapshot, thinned
from .disk import DiskCache
from .identity import CacheKind
from .options import DEFAULTS, NO_LIMIT

KINDS = ("assistant", "user", "system")  # in the order in which they go
# what is read from disk saves at least as many tokens' prefill
LEAST_GAIN = 128
LEAST_PROMPT = 512
logger = logging.getLogger(__name__)


@dataclass
class Counts:
    """What the prompt cache has done since the start."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    memory_tokens: int = 0
    disk_tokens: int = 0
    evictions: int = 0


class PromptCache:
    """Stands in for mlx-lm's ``LRUPromptCache``.

    An entry that continues another replaces it. Where caches cannot go back, what the shorter
    entry held at its end is kept as a mark of the longer one. Used by the generation thread alone,
    but for the counts and sums, which others read.

    Args:
        max_size: how many entries are held at most.
        max_bytes: how many bytes they take at most.
        disk: what keeps entries beyond the process, or None.
        checkpoints: how many marks an entry has at most.

    Attributes:
        has_room: whether as many bytes can be loaded from disk now.
    """

    def __init__(
        self,
        max_size: int,
        max_bytes: int = NO_LIMIT,
        disk: DiskCache | None = None,
        checkpoints: int = DEFAULTS["ctx_checkpoints"],
    ) -> None:
        self.max_size, self.max_bytes = max_size, max_bytes
        self.disk = disk
        self.checkpoints = checkpoints
        self.has_room: Callable[[int], bool] = lambda nbytes: True
        self.counts = Counts()
        # (model, entry), the least recently used first
        self._entries: list[tuple[Any, Entry]] = []
        self._nbytes: dict[int, int] = {}
        self._prompts: deque[np.ndarray] = deque(maxlen=256)
        self._models: Callable[[], list[nn.Module]] = list
        self._kinds: dict[Any, CacheKind] = {}

    def serve_models(self, models: Callable[[], list[nn.Module]]) -> None:
        """Say how the models are found whose caches these are: the model, and a draft model."""
        self._models = models

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries in memory."""
        return sum(list(self._nbytes.values()))

    @property
    def f16_bytes(self) -> int:
        """Bytes that their K and V would take in 16 bits."""
        return sum(entry.f16_bytes for _, entry in list(self._entries))

    def fetch_nearest_cache(
        self, model: Any, tokens: Sequence[int]
    ) -> tuple[list[Any] | None, Sequence[int]]:
        """Caches of the longest beginning of a prompt, and the tokens that are left.

        At least one token is left, because generation starts from its logits.

        Args:
            model: mlx_lm.server's key of the model.
        """
        wanted = np.asarray(tokens, np.int64)
        self._prompts.append(wanted)
        index, position = self._best(model, wanted)
        from_disk = self._load(model, wanted, position)
        if from_disk is not None:
            entry, position = from_disk
            self._add(model, entry)
            self.counts.disk_hits += 1
            self.counts.disk_tokens += position
            caches = entry.at(position)
            self._shrink(self.max_size, self.max_bytes)
            return caches, tokens[position:]
        if index is None:
            self.counts.misses += 1
            return None, tokens
        self._entries.append(self._entries.pop(index))
        self.counts.memory_hits += 1
        self.counts.memory_tokens += position
        return self._entries[-1][1].at(position), tokens[position:]

    def insert_cache(
        self,
        model: Any,
        tokens: Sequence[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Keep the caches of ``tokens``; those of a finished request go to disk too."""
        held = np.asarray(tokens, np.int64)
        if not len(held):
            return
        if cache_type != "assistant" and self._is_covered(model, held, prompt_cache):
            return
        # a slice of a batch's state would keep the whole batch's
        mx.eval([leaf.state for leaf in held_back(prompt_cache)])
        entry = Entry(held, prompt_cache, kind=cache_type)
        self._add(model, entry)
        if cache_type == "assistant" and self.disk is not None:
            n_prompt = self._prompt_of(held)
            if n_prompt >= LEAST_PROMPT:
                self.disk.offer(self._kind(model), entry)
        self._shrink(self.max_size, self.max_bytes)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Evict until as few entries, and as few bytes, are held."""
        self._shrink(
            NO_LIMIT if n_sequences is None else max(0, n_sequences),
            NO_LIMIT if n_bytes is None else max(0, n_bytes),
        )

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Entries and bytes by kind, as mlx_lm.server logs them."""
        found = {kind: {"n_sequences": 0, "n_bytes": 0} for kind in KINDS}
        for _, entry in list(self._entries):
            found[entry.kind]["n_sequences"] += 1
            found[entry.kind]["n_bytes"] += self._nbytes.get(id(entry), 0)
        return found

    def clear(self) -> None:
        """Drop what is in memory: arrays go in the thread that made them."""
        self._entries, self._nbytes, self._kinds = [], {}, {}

    def close(self) -> None:
        """Write what is waiting, and let go of the folder."""
        if self.disk is not None:
            self.disk.close()

    def _best(self, model: Any, wanted: np.ndarray) -> tuple[int | None, int]:
        """The entry that gives the longest beginning: its index, and the position."""
        best, position = None, 0
        for index, (key, entry) in enumerate(self._entries):
            if key != model:
                continue
            common = n_common(entry.tokens, wanted[:-1])
            if common <= position:
                continue
            found = entry.position(common)
            if found > position:
                best, position = index, found
        return best, position

    def _load(self, model: Any, wanted: np.ndarray, position: int) -> tuple[Entry, int] | None:
        """An entry from disk that gives more than ``position``, and where it can be taken back."""
        if self.disk is None or len(wanted) <= position + LEAST_GAIN:
            return None
        kind, least = self._kind(model), position + LEAST_GAIN
        entry = self.disk.find(kind, wanted, least, self.has_room)
        if entry is None:
            return None
        found = entry.position(n_common(entry.tokens, wanted[:-1]))
        return (entry, found) if found > position else None

    def _kind(self, model: Any) -> CacheKind:
        if model not in self._kinds:
            self._kinds = {model: CacheKind.of(self._models())}
        return self._kinds[model]

    def _prompt_of(self, held: np.ndarray) -> int:
        """Tokens of the request's prompt whose answer has ended; all where it is not known."""
        lengths = {
            len(prompt): index
            for index, prompt in enumerate(self._prompts)
            if len(prompt) <= len(held) and np.array_equal(prompt, held[: len(prompt)])
        }
        if not lengths:
            return len(held)
        longest = max(lengths)
        del self._prompts[lengths[longest]]
        return longest

    def _is_covered(self, model: Any, held: np.ndarray, caches: list[Any]) -> bool:
        """Whether a longer entry can give these caches, from now on."""
        n = len(held)
        for key, entry in self._entries:
            if key != model or len(entry.tokens) <= n or n_common(entry.tokens, held) < n:
                continue
            if not only_grows(caches) and entry.position(n) != n:
                self._mark(entry, {n: snapshot(caches)})
            return True
        return False

    def _mark(self, entry: Entry, marks: dict[int, list[Any]]) -> None:
        found = {**entry.marks, **marks}
        entry.marks = thinned(found, len(entry.tokens), self.checkpoints)
        self._nbytes[id(entry)] = entry.nbytes

    def _add(self, model: Any, entry: Entry) -> None:
        """Hold an entry in place of those that it continues."""
        kept = []
        for key, other in self._entries:
            common = n_common(entry.tokens, other.tokens) if key == model else 0
            if common:
                entry.take_marks(other, common)
            if common and common == len(other.tokens):
                self._nbytes.pop(id(other))
            else:
                kept.append((key, other))
        self._entries = [*kept, (model, entry)]
        self._mark(entry, {})

    def _shrink(self, n_sequences: int, n_bytes: int) -> None:
        while self._entries and (len(self._entries) > n_sequences or self.nbytes > n_bytes):
            _, entry = self._entries.pop(self._victim())
            self._nbytes.pop(id(entry))
            self.counts.evictions += 1

    def _victim(self) -> int:
        """The least recently used of a kind, as mlx-lm chooses it: answers before prompts."""
        kinds = [entry.kind for _, entry in self._entries]
        for kind, following in zip(KINDS, KINDS[1:]):
            if kind in kinds and kinds.count(kind) >= kinds.count(following):
                return kinds.index(kind)
        return kinds.index(KINDS[-1]) if KINDS[-1] in kinds else 0


def make(options: argparse.Namespace) -> PromptCache:
    """The server's prompt cache.

    Args:
        options: what ``options.parse`` read, with this package's own options.

    Raises:
        InputError: the folder cannot be used, or there are several machines.
    """
    for name in ("prompt_cache_dir", "memory_limit"):
        if getattr(options, name) is not None and distributed.n_processes() > 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} cannot be used over several machines.")
    max_bytes = NO_LIMIT if options.prompt_cache_bytes is None else options.prompt_cache_bytes
    folder = options.prompt_cache_dir
    disk = None if folder is None else DiskCache(folder, options.prompt_cache_disk)
    return PromptCache(options.prompt_cache_size, max_bytes, disk, options.ctx_checkpoints)
