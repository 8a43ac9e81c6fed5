"""What protected caches must hold, row by row in NumPy.

A sequence is a list of rows: which token, and how it is stored. Nothing here knows tiles or bits;
the values of each token in each format are worked out in float64 (doctor/oracle.py).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx
import numpy as np
from exact_rows import exact_rows

from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.doctor import oracle
from mlx_turbokv.quant import quantize
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.rotate import rotate

DIM, N_HEADS, N_TOKENS = 16, 2, 300
FINE, COARSE_TWICE, COARSE = range(3)  # turbo8, turbo8 and then the format, the format at once
TILE, LEAVE_TOGETHER = 32, 128
ATOL = 1e-4


class Tokens:
    """K and V of tokens as a model makes them, and as each way of storing them reads them back.

    Tokens whose codes float32 and float64 do not agree on are left out.

    Shapes:
        k, v: [tokens, N_HEADS, DIM]; stored: 3 ways times that shape.
    """

    def __init__(self, pair: tuple[str, str], centred: bool) -> None:
        rng = np.random.default_rng(0)
        mu = np.array(exact_rows(rng, N_HEADS, DIM)) * 4 if centred else np.zeros((N_HEADS, DIM))
        self.centre = None
        if centred:
            rope = RopeFrequencies.none(DIM)
            self.centre = Centre(mx.array(mu.astype(np.float32)), rope, "test")
        sides = []
        agreed = np.ones(N_TOKENS, bool)
        for name, offset in zip(pair, (mu, np.zeros_like(mu))):
            rows = np.array(exact_rows(rng, N_TOKENS, N_HEADS, DIM))
            stored, same = _stored(rows, KVFormat.parse(name))
            agreed &= same
            sides.append((rows + offset.astype(np.float32), stored + offset))
        (self.k, self.k_stored), (self.v, self.v_stored) = (
            (rows[agreed], stored[:, agreed]) for rows, stored in sides
        )
        if not 0.9 * N_TOKENS < len(self.k):
            raise ArithmeticError(f"only {len(self.k)} of {N_TOKENS} tokens have certain codes")

    def rows(self, ids: list[list[int]]) -> tuple[mx.array, mx.array]:
        """K and V of these tokens of each sequence, [B, N_HEADS, n, DIM]."""
        k, v = (np.swapaxes(x[np.array(ids)], 1, 2) for x in (self.k, self.v))
        return mx.array(k), mx.array(v)


@cache
def tokens(pair: tuple[str, str], centred: bool) -> Tokens:
    return Tokens(pair, centred)


def _stored(rows: np.ndarray, fmt: KVFormat) -> tuple[np.ndarray, np.ndarray]:
    """The three ways of reading rows back, and the tokens whose codes are certain."""

    if fmt.is_f16:
        return np.stack([rows] * 3), np.ones(len(rows), bool)

    def exact(x: np.ndarray, fmt: KVFormat) -> np.ndarray:
        return oracle.dequantized(*oracle.quantized(x, fmt), fmt)

    def single(y: mx.array, fmt: KVFormat) -> mx.array:
        if fmt.is_turbo:
            return quantize.values(*quantize.quantize_rotated(y, fmt), fmt, DIM, mx.float32)
        return quantize.values(*quantize.quantize(y, fmt), fmt, DIM, mx.float32)

    x = rows.astype(np.float64)
    y = rotate(mx.array(rows), DIM) if fmt.is_turbo else mx.array(rows)
    fine = exact(x, fmt.protected)
    twice = exact(fine, fmt) if fmt.protected != fmt else fine
    found = np.stack([fine, twice, exact(x, fmt)])
    fine_y = single(y, fmt.protected)
    ways = [fine_y, single(fine_y, fmt) if fmt.protected != fmt else fine_y, single(y, fmt)]
    if fmt.is_turbo:
        ways = [rotate(way, DIM, inverse=True) for way in ways]
    same = np.abs(np.stack([np.array(way) for way in ways]) - found) < ATOL
    return found, same.all(axis=(0, 2, 3))


@dataclass
class Sequence:
    """Tokens and how each is stored; ``left`` of them have left the newest ones."""

    ids: list[int] = field(default_factory=list)
    ways: list[int] = field(default_factory=list)
    left: int = 0


class ModelCache:
    """Sequences that end at the same row, after left padding.

    Args:
        sink, recent: protected tokens.

    Attributes:
        tail_start: the row before which all rows have left the newest ones, a multiple of 32.
        n: rows.
    """

    def __init__(self, sink: int, recent: int, n_sequences: int = 1) -> None:
        self.sink, self.recent = sink, recent
        self.sequences = [Sequence() for _ in range(n_sequences)]
        self.n = self.tail_start = 0
        self.padding = [0] * n_sequences

    copy = deepcopy

    def update(self, ids: list[list[int]], ends: list[int] | None = None) -> None:
        """Add tokens; ``ends`` are the rows where sequences end that are padded at the right."""
        before, self.n = self.n, self.n + len(ids[0])
        for sequence, new in zip(self.sequences, ids):
            sequence.ids += new
            sequence.ways += [FINE if self.recent else COARSE] * len(new)
        end = min(self.n, *ends) if ends else self.n
        if self.recent and end - self.tail_start >= self.recent + LEAVE_TOGETHER:
            stop = max(self.tail_start, (end - self.recent) // TILE * TILE)
            for sequence, padding in zip(self.sequences, self.padding):
                for i in range(max(0, sequence.left), max(0, stop - padding)):
                    sequence.ways[i] = COARSE_TWICE if i + padding < before else COARSE
                sequence.left = max(sequence.left, stop - padding)
            self.tail_start = stop
        for sequence in self.sequences:
            sequence.ways[: self.sink] = [FINE] * len(sequence.ways[: self.sink])

    def trim(self, n: int) -> None:
        self.n -= n
        for sequence, padding in zip(self.sequences, self.padding):
            kept = max(0, self.n - padding)
            sequence.ids, sequence.ways = sequence.ids[:kept], sequence.ways[:kept]
            sequence.left = min(sequence.left, self.n - padding)
        if self.n < self.tail_start:
            self.tail_start = self.n // TILE * TILE
        if self.n == 0:
            self.tail_start = 0

    @classmethod
    def joined(cls, parts: list[tuple[ModelCache, int]], n: int | None = None) -> ModelCache:
        """A cache of these sequences of others, which end at row ``n``."""
        first = parts[0][0]
        found = cls(first.sink, first.recent, len(parts))
        found.sequences = [deepcopy(cache.sequences[i]) for cache, i in parts]
        found._align(n)
        return found

    def _align(self, n: int | None = None) -> None:
        """End all sequences at row ``n``, by default the longest one's end."""
        lengths = [len(sequence.ids) for sequence in self.sequences]
        self.n = max(lengths) if n is None else n
        self.padding = [self.n - length for length in lengths]
        for sequence in self.sequences:
            sequence.left = min(max(0, sequence.left), len(sequence.ids))
        newest = [p + s.left for p, s in zip(self.padding, self.sequences)]
        self.tail_start = min(newest) // TILE * TILE

    def cut(self, counts: list[int]) -> None:
        """Drop the padding after each sequence's tokens."""
        for sequence, n in zip(self.sequences, counts):
            kept = len(sequence.ids) - n
            sequence.ids, sequence.ways = sequence.ids[:kept], sequence.ways[:kept]
        self._align(self.n)

    def kept(self, indices: list[int]) -> None:
        """Keep these sequences; padding that all of them have goes."""
        self.sequences = [self.sequences[i] for i in indices]
        self.padding = [self.padding[i] for i in indices]
        if min(self.padding):
            self._align()

    def rows(self, table: Tokens) -> list[list[np.ndarray]]:
        """K and V of each sequence, [N_HEADS, its tokens, DIM]."""
        return [
            [np.swapaxes(x[s.ways, s.ids], 0, 1) for x in (table.k_stored, table.v_stored)]
            for s in self.sequences
        ]
