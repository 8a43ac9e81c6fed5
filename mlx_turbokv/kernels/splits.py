"""How the splits of a head share its rows where tokens are protected."""

from __future__ import annotations

from typing import NamedTuple

from ..quant.layout import TILE

PROTECTED_COST = 2  # tiles of the body that take as long as a tile of protected rows
# SIMD groups of a threadgroup that work at the same time: an SM of NVIDIA's has four schedulers,
# and on Apple's GPUs a threadgroup has four SIMD groups
SIMDS_AT_ONCE = 4


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def longest(n_tiles: int, n_splits: int, step: int) -> int:
    """Tiles of the longest of some splits, counted in whole rounds of its SIMD groups.

    A round is ``step`` tiles of each SIMD group that works at the same time; one tile more costs as
    much as another round. On an H200, splits of 9 tiles made 8,192 tokens take 0.5 to 0.8 µs longer
    than splits of 8, of 12 µs.
    """
    of_a_round = SIMDS_AT_ONCE * step
    return ceil_div(n_tiles, n_splits * of_a_round) * of_a_round


class Shares(NamedTuple):
    """What the splits of a head read.

    Args:
        body_splits: how many read the body, from the first on.
        protected_split: the first that reads protected rows, as all after it do: the one after the
            body's splits, or the last of them where that reads both.
        spared_tiles: tiles of the body that its last split reads less than the others.
    """

    body_splits: int
    protected_split: int
    spared_tiles: int


class Segments(NamedTuple):
    """Where protected rows lie: what kernels/segments.py says of them.

    Args:
        tail_protected: whether the tail is of the protected rows' layout.
    """

    n_sunk: int
    first_tiles: int
    first_stride: int
    tail_start: int
    body_ends: tuple[int, ...]
    tail_protected: bool

    def shared_out(
        self, n_tokens: int, splits: int, simd_groups: int, steps: tuple[int, int]
    ) -> Shares:
        """How a head's splits share the rows: so that the slowest of them is soonest done.

        Args:
            splits: two at least, as many as the GPU runs at once.
            simd_groups: of a threadgroup.
            steps: tiles that a SIMD group handles at a time, of the body and of protected rows.
        """
        n_tiles, n_body = ceil_div(n_tokens, TILE), ceil_div(max(self.body_ends), TILE)
        n_tail = n_tiles - self.tail_start // TILE
        n_body, n_tail = (n_body, n_tail) if self.tail_protected else (n_tiles, 0)
        n_own = self.first_tiles + n_tail
        n_protected = PROTECTED_COST * n_own
        if n_body == 0:
            return Shares(0, 0, 0)
        share = (n_body + n_protected) / splits

        def rounds(body: int) -> tuple[float, ...]:
            own = PROTECTED_COST * longest(n_own, splits - body, steps[1])
            others = longest(n_body, body, steps[0])
            return max(others, own), others, max(n_body / body, n_protected / (splits - body))

        near = min(max(1, int(n_body / share)), splits - 1)
        body = min(range(max(1, near - 1), min(near + 2, splits - 1) + 1), key=rounds)
        apart = rounds(body)[0], ceil_div(n_body, body)
        # one that reads both starts a second loop: its SIMD groups are spared whole steps
        stride = simd_groups * steps[0]
        spared = ceil_div(n_protected, stride) * stride
        n = n_body + spared
        if n // splits > spared and (longest(n, splits, steps[0]), ceil_div(n, splits)) < apart:
            return Shares(splits, splits - 1, spared)
        return Shares(body, body, 0)
