"""How the splits of a head share its rows where tokens are protected."""

from __future__ import annotations

from typing import NamedTuple

from ..quant.layout import TILE

PROTECTED_COST = 2  # tiles of the body that take as long as a tile of protected rows


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

    def shared_out(self, n_tokens: int, splits: int, mixed_gain: float) -> Shares:
        """How a head's splits share the rows: so that the slowest of them is soonest done.

        Args:
            splits: two at least, as many as the GPU runs at once.
            mixed_gain: as in ``Tuning``.
        """
        n_tiles, n_body = -(-n_tokens // TILE), -(-max(self.body_ends) // TILE)
        n_tail = n_tiles - self.tail_start // TILE
        n_body, n_tail = (n_body, n_tail) if self.tail_protected else (n_tiles, 0)
        n_protected = PROTECTED_COST * (self.first_tiles + n_tail)
        if n_body == 0:
            return Shares(0, 0, 0)
        share = (n_body + n_protected) / splits
        fewest = min(max(1, int(n_body / share)), splits - 1)
        slowest, body = min(
            (max(n_body / body, n_protected / (splits - body)), body)
            for body in (fewest, min(fewest + 1, splits - 1))
        )
        if share > n_protected and slowest > mixed_gain * share:
            return Shares(splits, splits - 1, n_protected)
        return Shares(body, body, 0)
