"""Scales of keys by pair of dims: loud pairs are made quieter, and pairs that queries read louder.

Quantisation leaves the same error in all dims of a head, whatever their energy. A score is a sum of
products by dims, so a key may be multiplied by any scales and a query divided by them; both dims of
a pair that RoPE rotates need the same one. Scales (E[q^2] / E[k^2]) ** EXPONENT take error away
where queries are large, at no bits and with nothing to store but the scales.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from .rope import RopeFrequencies

EXPONENT = 1 / 8  # docs/results/research.md; 1/4 would be best if errors were normal
# the least energy of a pair, as a share of the mean of its head: some never vary
LEAST_ENERGY = 1e-6
MOST = 64.0  # no scale is above this or below its inverse


class PairScales:
    """The scales of one layer's keys. Immutable.

    Args:
        of_pairs: positive and finite.
        rope: what the pairs are.

    Shapes:
        of_pairs: [H, head_dim / 2].

    Raises:
        ValueError: it has other pairs than ``rope``.
    """

    def __init__(self, of_pairs: mx.array, rope: RopeFrequencies) -> None:
        if of_pairs.ndim != 2 or 2 * of_pairs.shape[1] != rope.head_dim:
            raise ValueError(f"[PairScales] {of_pairs.shape} does not fit {rope.head_dim} dims.")
        self.of_pairs = of_pairs.astype(mx.float32)
        place = mx.array(np.argsort(np.concatenate(rope.pairs())))
        self.of_dims = mx.concatenate([self.of_pairs, self.of_pairs], axis=-1)[:, place]
        self.inverse = 1 / self.of_dims
        mx.eval(self.of_pairs, self.of_dims, self.inverse)

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.of_pairs.nbytes + self.of_dims.nbytes + self.inverse.nbytes

    def scaled(self, keys: mx.array) -> mx.array:
        """Keys times their scales, in float32.

        Shapes:
            keys: [B, H, L, head_dim].
        """
        return keys.astype(mx.float32) * self.of_dims[:, None]

    def unscaled(self, x: mx.array) -> mx.array:
        """Queries that meet scaled keys, or scaled keys as they were, in float32.

        Shapes:
            x: [B, n_heads, L, head_dim], n_heads a multiple of H.
        """
        grouped = x.astype(mx.float32).reshape(x.shape[0], self.of_dims.shape[0], -1, x.shape[-1])
        return (grouped * self.inverse[:, None]).reshape(x.shape)

    @classmethod
    def from_energies(
        cls, queries: np.ndarray, keys: np.ndarray, rope: RopeFrequencies
    ) -> PairScales:
        """The scales that follow from mean squares; the geometric mean of each head's is 1.

        Shapes:
            queries, keys: [H, head_dim], of the queries that read a KV head, and of what is stored
                of its keys.
        """
        first, second = rope.pairs()
        logs = []
        for x in (queries, keys):
            pairs = np.asarray(x, np.float64)[:, first] + np.asarray(x, np.float64)[:, second]
            least = LEAST_ENERGY * pairs.mean(axis=-1, keepdims=True) + np.finfo(np.float64).tiny
            logs.append(np.log(np.maximum(pairs, least)))
        scales = EXPONENT * (logs[0] - logs[1])
        scales = np.exp(scales - scales.mean(axis=-1, keepdims=True))
        return cls(mx.array(scales.astype(np.float32)), rope)

    @classmethod
    def from_state(cls, of_pairs: Any, rope: RopeFrequencies) -> PairScales:
        """From what a file holds.

        Raises:
            ValueError: it is something else.
        """
        check_scales(of_pairs, "its scales")
        return cls(of_pairs, rope)


def check_scales(of_pairs: Any, name: str) -> None:
    """Check scales that nobody here made.

    Raises:
        ValueError: they are no array of positive numbers within bounds.
    """
    if (
        not isinstance(of_pairs, mx.array)
        or of_pairs.ndim != 2
        or of_pairs.size == 0
        or not mx.issubdtype(of_pairs.dtype, mx.floating)
    ):
        raise ValueError(f"{name} have another shape or type")
    if not mx.all((of_pairs >= 1 / MOST) & (of_pairs <= MOST)).item():
        raise ValueError(f"{name} are not all from {1 / MOST:g} to {MOST:g}")
