"""What is taken out of keys before they are quantised: the anchors of one layer.

Keys carry a large part that hardly varies from token to token: before RoPE, a constant vector mu
(the key projection's bias, or a calibrated mean). RoPE turns its pairs of dims with the position.
Positions are cut into blocks of BLOCK, and the anchor of a block is the mean of RoPE(mu) over its
positions, which of all constant vectors leaves the least energy behind. A pair that turns by the
angle x in half a block keeps sin(x)/x of its length in it: slow pairs are taken out whole, and
pairs too fast for a block fade out of the anchor by themselves.

The key of position t is stored as quant(k - anchor) and read as that plus the anchor, or, in a
score, as q.k + q.anchor with one product a block. Anchors depend on the position alone, so cuts of
a prompt, trims and batches need no care. They are pairs of mu turned by one table of cosines and
sines for all layers and heads, rounded to half once, so writing and reading agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

BLOCK = 32
# blocks by which the table of cosines and sines grows: it is made anew each time
TABLE_STEP = 256


@dataclass(frozen=True)
class Turning:
    """How the pairs of dims of a key turn with the position.

    Pair i is dims (i, half + i) for i < half, and dims (2 i, 2 i + 1) from there on.

    Args:
        half: pairs whose dims lie apart; 0 where RoPE is traditional or there is none.
        angles: radians per position of each pair, float32 values; 0 where nothing turns.
    """

    half: int
    angles: tuple[float, ...]

    @classmethod
    def of_rope(
        cls,
        head_dim: int,
        dims: int,
        traditional: bool,
        base: float | None = None,
        scale: float = 1.0,
        freqs: np.ndarray | None = None,
    ) -> Turning:
        """From the arguments of ``mx.fast.rope``."""
        angles = np.zeros(head_dim // 2)
        if freqs is None:
            angles[: dims // 2] = scale * base ** (-np.arange(0, dims, 2) / dims)
        else:
            angles[: dims // 2] = scale / np.asarray(freqs, np.float64)
        angles = angles.astype(np.float32)
        return cls(0 if traditional else dims // 2, tuple(float(a) for a in angles))

    @classmethod
    def none(cls, head_dim: int) -> Turning:
        """Keys that do not depend on the position."""
        return cls(0, (0.0,) * (head_dim // 2))

    @property
    def head_dim(self) -> int:
        """Values of a key."""
        return 2 * len(self.angles)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The first and the second dim of each pair."""
        i = np.arange(self.head_dim // 2)
        apart = i < self.half
        return np.where(apart, i, 2 * i), np.where(apart, self.half + i, 2 * i + 1)


def block_means(turning: Turning, n_blocks: int) -> np.ndarray:
    """Mean cosine and sine of each pair's angle over each block's positions.

    Shapes:
        returns: [n_blocks, pairs, 2] float16, cosine and sine.
    """
    angles = np.array(turning.angles, np.float64)
    small = np.abs(angles) < 1e-9
    halves = np.where(small, 1.0, angles) / 2
    length = np.where(small, 1.0, np.sin(BLOCK * halves) / (BLOCK * np.sin(halves)))
    centres = np.arange(n_blocks)[:, None] * BLOCK + (BLOCK - 1) / 2
    turned = centres * angles
    return np.stack([np.cos(turned) * length, np.sin(turned) * length], -1).astype(np.float16)


@lru_cache(maxsize=64)
def _table(turning: Turning, n_blocks: int) -> mx.array:
    array = mx.array(block_means(turning, n_blocks).view(np.uint32)[..., 0])
    mx.eval(array)  # the server generates in a thread of its own
    return array


@lru_cache(maxsize=64)
def _pair_indices(turning: Turning) -> tuple[mx.array, mx.array, mx.array]:
    """Dims of the pairs, and the place of each dim in (first dims, second dims)."""
    first, second = turning.pairs()
    arrays = tuple(mx.array(x.astype(np.int32)) for x in (first, second, np.argsort(np.concatenate([first, second]))))  # fmt: skip
    mx.eval(arrays)
    return arrays


class Centre:
    """The reference of one layer's keys, and the anchors that follow from it. Immutable.

    Args:
        mu: the key that is taken out, as it is at position 0.
        turning: how positions turn it.
        source: what it was taken from, for people.
        n_sharing: layers that share the table of cosines and sines.
        bare_first: whether a sequence's first key is stored whole: an attention sink, it is unlike
            all others, and mu would be added to it rather than taken out.

    Shapes:
        mu: [H, head_dim].

    Raises:
        ValueError: mu and turning differ in head_dim.
    """

    def __init__(
        self,
        mu: mx.array,
        turning: Turning,
        source: str,
        n_sharing: int = 1,
        bare_first: bool = False,
    ) -> None:
        if mu.ndim != 2 or mu.shape[-1] != turning.head_dim:
            raise ValueError(f"[Centre] mu {mu.shape} does not fit a head of {turning.head_dim}.")
        self.mu = mu.astype(mx.float32)
        self.turning = turning
        self.source = source
        self.n_sharing = n_sharing
        self.bare_first = bare_first
        self._table: tuple[int, mx.array | None] = (0, None)
        self._angles = mx.array(np.array(turning.angles, np.float32))
        mx.eval(self.mu, self._angles)
        content = np.array(self.mu).tobytes() + repr((turning, BLOCK, bare_first)).encode()
        self.digest = hashlib.sha256(content).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Centre) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: dict) -> Centre:
        return self

    def table(self, n_rows: int) -> mx.array:
        """Mean cosines and sines of at least the blocks of ``n_rows`` positions.

        Shapes:
            returns: [blocks, pairs] uint32, a cosine in the low half and a sine in the high one.
        """
        n_blocks = -(-n_rows // (BLOCK * TABLE_STEP)) * TABLE_STEP
        if self._table[0] != n_blocks:  # asked for at every step and layer
            self._table = n_blocks, _table(self.turning, n_blocks)
        return self._table[1]

    def anchors(self, first: int, n: int) -> mx.array:
        """The anchors of blocks ``first`` to ``first + n``.

        Shapes:
            returns: [n, H, head_dim] float32.
        """
        first_dims, second_dims, place = _pair_indices(self.turning)
        x, y = self.mu[:, first_dims], self.mu[:, second_dims]
        words = self.table(BLOCK * (first + n))[first : first + n, None, :, None]
        entries = words.view(mx.float16).astype(mx.float32)
        cosine, sine = entries[..., 0], entries[..., 1]
        return mx.concatenate([x * cosine - y * sine, x * sine + y * cosine], axis=-1)[..., place]

    def rows(
        self,
        first: int,
        n: int,
        padding: tuple[int, ...] | None = None,
        basis: Callable[[mx.array], mx.array] = lambda anchors: anchors,
    ) -> mx.array:
        """The anchors of rows ``first`` to ``first + n``.

        Args:
            padding: rows before position 0 of each sequence, which have no anchor; None where
                there are none.
            basis: a linear map that the anchors go through.

        Shapes:
            returns: [B or 1, H, n, head_dim] float32.
        """
        starts = np.array(padding or (0,))[:, None]
        positions = np.arange(first, first + n) - starts
        blocks = np.maximum(positions, 0) // BLOCK
        low, high = int(blocks.min()), int(blocks.max())
        anchors = basis(self.anchors(low, high - low + 1))
        rows = mx.swapaxes(anchors[mx.array((blocks - low).astype(np.int32))], 1, 2)
        whole = positions < int(self.bare_first)
        if whole.any():
            rows = mx.where(mx.array(whole)[:, None, :, None], 0, rows)
        return rows

    def nbytes(self, n_rows: int) -> int:
        """Bytes resident for ``n_rows`` positions: mu, and this layer's share of the table."""
        return self.mu.nbytes + self.table(max(n_rows, 1)).nbytes // self.n_sharing

    @property
    def state(self) -> list:
        """What makes it anew: arrays and scalars."""
        return [BLOCK, self.mu, self.turning.half, self._angles, self.source, self.n_sharing,
                self.bare_first]  # fmt: skip

    @classmethod
    def from_state(cls, state: list) -> Centre:
        """The inverse of ``state``.

        Raises:
            ValueError: it is no such state, or of another block size.
        """
        block, mu, half, angles, source, n_sharing, bare_first = state
        if int(block) != BLOCK:
            raise ValueError(f"its keys are centred in blocks of {block}, not {BLOCK}")
        turning = Turning(int(half), tuple(float(a) for a in np.array(angles)))
        return cls(mu, turning, str(source), int(n_sharing), bool(bare_first))
