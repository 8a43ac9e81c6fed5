"""Centred keys: the anchors that are subtracted from one layer's keys before quantisation.

Keys carry a large part that hardly varies from token to token: before RoPE, a constant vector mu
(the key projection's bias, or a calibrated mean). RoPE rotates its pairs of dims by angles that
grow with the position. Positions are cut into blocks of BLOCK, and the anchor of a block is the
mean of RoPE(mu) over its positions: of all constant vectors it leaves the least energy. A pair that
rotates by the angle x in half a block keeps sin(x)/x of its length in the anchor, so slow pairs are
subtracted whole and pairs too fast for a block hardly at all.

The key of position t is stored as quant(k - anchor) and read as that plus the anchor, or, in a
score, as q.k + q.anchor with one product a block. Anchors depend on the position alone, not on how
a prompt was cut. They are mu rotated by one table of cosines and sines for all layers and heads,
rounded to fp16 once, so that writing and reading use the same values.

Pairs of dims may be scaled as well (scales.py): then all of this is about keys times their scales,
and queries are divided by them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import numpy as np

from .rope import RopeFrequencies
from .scales import PairScales

BLOCK = 32
# rows of a head in Centre.kernel_rows, and which of them the inverse scales are (metal/anchor.h)
KERNEL_ROWS, INVERSE_SCALES = 3, 2
# blocks by which the table of cosines and sines grows: it is made anew each time
TABLE_STEP = 256


def block_means(rope: RopeFrequencies, n_blocks: int) -> np.ndarray:
    """Mean cosine and sine of each pair's angle over each block's positions.

    Shapes:
        returns: [n_blocks, pairs, 2] float16, cosine and sine.
    """
    angles, length = np.array(rope.angles, np.float64), lengths_left(rope)
    centres = np.arange(n_blocks)[:, None] * BLOCK + (BLOCK - 1) / 2
    phases = centres * angles
    return np.stack([np.cos(phases) * length, np.sin(phases) * length], -1).astype(np.float16)


def lengths_left(rope: RopeFrequencies) -> np.ndarray:
    """What an anchor keeps of the length of each pair of mu.

    Shapes:
        returns: [pairs] float64.
    """
    angles = np.array(rope.angles, np.float64)
    small = np.abs(angles) < 1e-9
    halves = np.where(small, 1.0, angles) / 2
    return np.where(small, 1.0, np.sin(BLOCK * halves) / (BLOCK * np.sin(halves)))


@lru_cache(maxsize=64)
def _table(rope: RopeFrequencies, n_blocks: int) -> mx.array:
    array = mx.array(block_means(rope, n_blocks).view(np.uint32)[..., 0])
    mx.eval(array)  # the server generates in a thread of its own
    return array


@lru_cache(maxsize=64)
def _pair_indices(rope: RopeFrequencies) -> tuple[mx.array, mx.array, mx.array]:
    """Dims of the pairs, and the place of each dim in (first dims, second dims)."""
    first, second = rope.pairs()
    place = np.argsort(np.concatenate([first, second]))
    arrays = [mx.array(x.astype(np.int32)) for x in (first, second, place)]
    mx.eval(arrays)
    return arrays[0], arrays[1], arrays[2]


class Centre:
    """The reference of one layer's keys, and the anchors that follow from it. Immutable.

    Args:
        mu: the key that is taken out, as it is at position 0.
        rope: its RoPE frequencies.
        source: what it was taken from, for messages.
        n_sharing: layers that share the table of cosines and sines.
        first_key_uncentred: whether a sequence's first key is stored without centring: it is an
            attention sink, unlike all other keys, and does not contain mu.
        scales: what keys are multiplied by first; mu is that of the products.

    Shapes:
        mu: [H, head_dim].

    Raises:
        ValueError: mu and rope differ in head_dim, or the scales in heads or pairs.
    """

    def __init__(
        self,
        mu: mx.array,
        rope: RopeFrequencies,
        source: str,
        n_sharing: int = 1,
        first_key_uncentred: bool = False,
        scales: PairScales | None = None,
    ) -> None:
        if mu.ndim != 2 or mu.shape[-1] != rope.head_dim:
            raise ValueError(f"[Centre] mu {mu.shape} does not fit a head of {rope.head_dim}.")
        self.rope = rope
        self.source = source
        self.n_sharing = n_sharing
        self.first_key_uncentred = first_key_uncentred
        if scales is not None and scales.of_dims.shape != mu.shape:
            raise ValueError(f"[Centre] scales of {scales.of_dims.shape} do not fit mu {mu.shape}.")
        self.scales = scales
        ones = mx.ones(mu.shape, mx.float32)
        factors = (ones, ones) if scales is None else (scales.of_dims, scales.inverse)
        # what kernels take: mu, what keys are multiplied by, and the inverse; [H, 3, head_dim]
        self.kernel_rows = mx.stack([mu.astype(mx.float32), *factors], axis=1)
        self.mu = self.kernel_rows[:, 0]
        self._table = 0, mx.zeros((0,), mx.uint32)  # blocks, and the table of them
        self._angles = mx.array(np.array(rope.angles, np.float32))
        mx.eval(self.kernel_rows, self.mu, self._angles)
        content = np.array(self.mu).tobytes() + repr((rope, BLOCK, first_key_uncentred)).encode()
        if scales is not None:
            content += np.array(scales.of_pairs).tobytes()
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
            self._table = n_blocks, _table(self.rope, n_blocks)
        return self._table[1]

    def scaled(self, keys: mx.array) -> mx.array:
        """Keys times their scales, if there are any, in float32.

        Shapes:
            keys: [B, H, L, head_dim].
        """
        return keys.astype(mx.float32) if self.scales is None else self.scales.scaled(keys)

    def anchors(self, first: int, n: int) -> mx.array:
        """The anchors of blocks ``first`` to ``first + n``.

        Shapes:
            returns: [n, H, head_dim] float32.
        """
        first_dims, second_dims, place = _pair_indices(self.rope)
        x, y = self.mu[:, first_dims], self.mu[:, second_dims]
        words = self.table(BLOCK * (first + n))[first : first + n, None, :, None]
        entries = words.view(mx.float16).astype(mx.float32)
        cosine, sine = entries[..., 0], entries[..., 1]
        return mx.concatenate([x * cosine - y * sine, x * sine + y * cosine], axis=-1)[..., place]

    def rows(
        self,
        first: int,
        n: int,
        left_padding: mx.array | None = None,
        basis: Callable[[mx.array], mx.array] = lambda anchors: anchors,
    ) -> mx.array:
        """The anchors of rows ``first`` to ``first + n``.

        Args:
            left_padding: rows before position 0 of each sequence; None where there are none.
            basis: a linear map that the anchors go through.

        Shapes:
            left_padding: [B] int32; returns: [B or 1, H, n, head_dim] float32.
        """
        starts = np.zeros(1, int) if left_padding is None else np.array(left_padding)
        positions = np.arange(first, first + n) - starts[:, None]
        blocks = np.maximum(positions, 0) // BLOCK
        low, high = int(blocks.min()), int(blocks.max())
        anchors = basis(self.anchors(low, high - low + 1))
        rows = mx.swapaxes(anchors[mx.array((blocks - low).astype(np.int32))], 1, 2)
        uncentred = positions < int(self.first_key_uncentred)
        if uncentred.any():
            rows = mx.where(mx.array(uncentred.tolist())[:, None, :, None], 0, rows)
        return rows

    def nbytes(self, n_rows: int) -> int:
        """Bytes resident for ``n_rows`` positions: of kernels, of scales, a share of the table."""
        own = self.kernel_rows.nbytes + (0 if self.scales is None else self.scales.nbytes)
        return own + self.table(max(n_rows, 1)).nbytes // self.n_sharing

    @property
    def state(self) -> list:
        """What makes it anew: arrays and scalars."""
        values = [BLOCK, self.mu, self.rope.split_pairs, self._angles, self.source, self.n_sharing,
                  self.first_key_uncentred]  # fmt: skip
        return values if self.scales is None else [*values, self.scales.of_pairs]

    @classmethod
    def from_state(cls, state: list) -> Centre:
        """The inverse of ``state``.

        Raises:
            ValueError: it is no such state, or of another block size.
        """
        if not isinstance(state, (list, tuple)) or len(state) not in (7, 8):
            raise ValueError("its centre is none")
        block, mu, split_pairs, angles, source, n_sharing, first_key_uncentred = state[:7]
        if type(block) is not int or block != BLOCK:
            raise ValueError(f"its keys are centred in blocks of {block!r}, not {BLOCK}")
        for name, array, ndim in (("mu", mu, 2), ("angles", angles, 1)):
            if not isinstance(array, mx.array) or array.ndim != ndim or array.size == 0:
                raise ValueError(f"its centre's {name} have another shape")
            if not mx.issubdtype(array.dtype, mx.floating) or not mx.isfinite(array).all().item():
                raise ValueError(f"its centre's {name} are not all finite numbers")
        if type(split_pairs) is not int or not 0 <= split_pairs <= angles.size:
            raise ValueError(f"its centre has {split_pairs!r} split pairs of {angles.size}")
        if type(n_sharing) is not int or n_sharing < 1:
            raise ValueError(f"its centre is shared by {n_sharing!r} layers")
        if not isinstance(source, str) or not isinstance(first_key_uncentred, bool):
            raise ValueError("its centre does not say what it was taken from")
        rope = RopeFrequencies(split_pairs, tuple(float(a) for a in np.array(angles, np.float32)))
        scales = PairScales.from_state(state[7], rope) if len(state) == 8 else None
        return cls(mu, rope, source, n_sharing, first_key_uncentred, scales)
