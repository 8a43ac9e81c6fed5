"""Positions that caches can be taken back to.

Rows of K and V can be taken off the end in any number. A recurrent state cannot go back, and a
window only a few tokens once it has moved on: copies of those alone are kept at some positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache

from ..cache.rotating import SPARE_TOKENS, TurboRotatingKVCache
from ..cache.single import TurboKVCache
from ..cache.summary import leaves, summarize

GROWING = (TurboKVCache, KVCache)


class _CannotGoBackError(ValueError):
    """A cache does not hold what it held some tokens ago."""


@dataclass(eq=False)
class Entry:
    """Caches of a sequence, and what is kept of some positions within it.

    tokens: [n] int64, whose K and V the caches hold.
    caches: mlx-lm's list, one a layer.
    marks: what ``snapshot`` gave, by position.
    kind: ``assistant``, ``user`` or ``system``, as mlx_lm.server calls what ends at the last token.
    """

    tokens: np.ndarray
    caches: list[Any]
    marks: dict[int, list[Any]] = field(default_factory=dict)
    kind: str = "assistant"

    def __post_init__(self) -> None:
        self.only_grows = only_grows(self.caches)
        self.f16_bytes = summarize(self.caches).f16_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the caches and of all marks."""
        marked = sum(leaf.nbytes for mark in self.marks.values() for leaf in mark)
        return sum(cache.nbytes for cache in self.caches) + marked

    def position(self, n_common: int) -> int:
        """The last position up to ``n_common`` that ``at`` can give; 0 where there is none."""
        n = len(self.tokens)
        if n_common >= n:
            return n
        if self.only_grows or (n_common and _can_go_back(held_back(self.caches), n - n_common)):
            return n_common
        return max((p for p in self.marks if p <= n_common), default=0)

    def reach(self) -> int:
        """How many tokens can be taken back from the end without a mark."""
        return len(self.tokens) if self.only_grows else most_back(self.caches, len(self.tokens))

    def at(self, position: int) -> list[Any]:
        """Copies of the caches as they were after ``position`` tokens.

        Raises:
            ValueError: they cannot go back to it.
        """
        return taken_back(self.caches, len(self.tokens) - position, self.marks.get(position))

    def take_marks(self, other: Entry, n_common: int) -> None:
        """Keep another entry's marks within the tokens that both have, its end included."""
        if self.only_grows:
            return
        found = {p: mark for p, mark in other.marks.items() if p <= n_common}
        if n_common == len(other.tokens) < len(self.tokens):
            found[n_common] = snapshot(other.caches)
        self.marks = {**found, **self.marks}


def n_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens two sequences share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n


def only_grows(caches: Iterable[Any]) -> bool:
    """Whether any number of tokens can be taken off the end."""
    return all(_grows(leaf) for leaf in leaves(caches))


def held_back(caches: Iterable[Any]) -> list[Any]:
    """The leaves that cannot go back."""
    return [leaf for leaf in leaves(caches) if not _grows(leaf)]


def snapshot(caches: Iterable[Any]) -> list[Any]:
    """Copies of the leaves that cannot go back."""
    return copy.deepcopy(held_back(caches))


def taken_back(caches: list[Any], n: int, mark: list[Any] | None = None) -> list[Any]:
    """Copies of caches without their last ``n`` tokens.

    Args:
        mark: what ``snapshot`` gave at that position.

    Raises:
        ValueError: without a mark, where a leaf cannot go back as far.
    """
    marked = iter(mark or ())

    def back(leaf: Any) -> Any:
        if mark is not None and not _grows(leaf):
            return copy.deepcopy(next(marked))
        leaf = copy.deepcopy(leaf)
        _trim(leaf, n)
        return leaf

    return _map_leaves(back, caches)


def most_back(caches: Iterable[Any], n_tokens: int) -> int:
    """How many tokens of ``n_tokens`` all leaves can go back: all, or what windows have spare."""
    held = held_back(caches)
    if _can_go_back(held, n_tokens):
        return n_tokens
    least, most = 0, min(SPARE_TOKENS, n_tokens)
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if _can_go_back(held, middle) else (least, middle - 1)
    return least


def thinned(marks: dict[int, list[Any]], n_tokens: int, most: int) -> dict[int, list[Any]]:
    """At most ``most`` marks, denser towards the end.

    The one that goes is the one whose neighbours are closest to each other, measured against
    their distance from the end.
    """
    kept = sorted(p for p in marks if 0 < p < n_tokens)
    while len(kept) > most:
        bounds = [0, *kept, n_tokens]
        gaps = [
            (bounds[i + 1] - bounds[i - 1]) / (n_tokens - bounds[i - 1])
            for i in range(1, len(bounds) - 1)
        ]
        kept.pop(gaps.index(min(gaps)))
    return {p: marks[p] for p in kept}


def split_at_multiples(
    segments: list[list[int]], kinds: list[str], every: int
) -> tuple[list[list[int]], list[str]]:
    """Cut a prompt's segments at multiples of ``every`` tokens too.

    Args:
        segments: tokens, in order; a cache is kept at the end of each but the last.
        kinds: what each segment is called.
    """
    cut: list[list[int]] = []
    names: list[str] = []
    start = 0
    for segment, kind in zip(segments, kinds):
        end = start + len(segment)
        bounds = [start, *range((start // every + 1) * every, end, every), end]
        for a, b in zip(bounds, bounds[1:]):
            cut.append(segment[a - start : b - start])
            names.append(kind)
        start = end
    return cut, names


def _grows(leaf: Any) -> bool:
    return type(leaf) in GROWING


def _can_go_back(held: list[Any], n: int) -> bool:
    try:
        for leaf in held:
            _trim(copy.copy(leaf), n)
    except _CannotGoBackError:
        return False
    return True


def _trim(leaf: Any, n: int) -> None:
    """Take exactly ``n`` tokens off a leaf, or raise."""
    if n == 0 or leaf.empty():
        return
    is_moved_chunk = isinstance(leaf, ChunkedKVCache) and leaf.start_position > 0
    is_packed_window = isinstance(leaf, TurboRotatingKVCache)
    if is_moved_chunk or not (is_packed_window or leaf.is_trimmable()):
        raise _CannotGoBackError(f"A {type(leaf).__name__} cannot go back {n:,} tokens.")
    try:
        n_back = leaf.trim(n)
    except ValueError as error:
        raise _CannotGoBackError(str(error)) from None
    if n_back != n:
        raise _CannotGoBackError(f"A {type(leaf).__name__} went back {n_back:,} of {n:,} tokens.")


def _map_leaves(function: Callable[[Any], Any], caches: Iterable[Any]) -> list[Any]:
    """The same lists with each leaf replaced."""
    return [
        CacheList(*_map_leaves(function, cache.caches))
        if isinstance(cache, CacheList)
        else function(cache)
        for cache in caches
    ]
