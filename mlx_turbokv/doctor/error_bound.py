"""Attention over packed rows in float64, and how far a right kernel may be from it.

The bound follows from the number formats of metal/decode.metal. A rounding moves the output by a
known vector times an error that is at most half a unit in the last place, about independent of the
others. Such a sum is longer than TIMES times the root of its sum of squares with a probability of
at most 2 exp(-TIMES^2 / 2), 0.02, even if every error is as large as it can be and only its sign is
random (Hoeffding). Roundings are spread evenly, which makes the variance a third of that: the bound
is 5.2 standard deviations, which 2e-7 of the rows exceed. What rounds the result is added in full.

Roundings: products of queries and keys, and of weights and values, are half where
decode_queries.h and decode_values.h say so, their partial sums as well. All else is float32, whose
roundings, and those of fast exp2, are taken as FLOAT.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..kernels import reference
from ..kernels.packed import PackedKV
from ..kernels.segments import AnyKV
from ..quant.formats import KVFormat
from ..quant.tiles import tiles_to_rows
from .oracle import float64, parts_of, rotated

TIMES = 3.0
HALF = 2.0**-11
FLOAT = 2.0**-21
CHAIN, CHAIN_TOKENS = 16, 8  # dims and tokens whose products are summed in half
HEADROOM = 6  # the largest weight is at least 2^HEADROOM where weights are half
# bits of the output's numbers, and half the smallest one
DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24}
LEAST = {"float16": 2.0**-25, "bfloat16": 1e-38, "float32": 1e-38}


class Result(NamedTuple):
    """Attention, and the length of the error allowed in each of its rows.

    Shapes:
        output: [B, n_heads, L, v_head_dim]; bound: [B, n_heads, L].
    """

    output: np.ndarray
    bound: np.ndarray

    def ratio(self, output: mx.array) -> float:
        """The largest error of a row as a part of its bound; infinite where it is not finite."""
        got = np.array(output.astype(mx.float32)).astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.linalg.norm(got - self.output, axis=-1)
        return float(np.where(np.isfinite(error), error / self.bound, np.inf).max())


def attention(
    queries: mx.array,
    packed: AnyKV,
    scale: float,
    seen: np.ndarray,
    sinks: mx.array | None,
) -> Result:
    """Attention in float64 over the rows that are stored, with its bound.

    Shapes:
        queries: [B, n_heads, L, k_head_dim]; seen: [B, 1, L, n] bool; sinks: [n_heads].
    """
    layout = packed.layout
    rows = _Rows(packed)
    q = float64(queries)
    if packed.centre is not None and packed.centre.scales is not None:
        of_dims = float64(packed.centre.scales.of_dims)
        q = q / np.repeat(of_dims, q.shape[1] // len(of_dims), axis=0)[:, None]
    batch, n_heads, n_queries, _ = q.shape
    gqa = n_heads // rows.keys.shape[1]
    output = np.zeros((batch, n_heads, n_queries, layout.v_head_dim))
    bound = np.zeros((batch, n_heads, n_queries))
    dtype = str(queries.dtype).removeprefix("mlx.core.")
    for b in range(batch):
        for h in range(n_heads):
            sink = None if sinks is None else float(float64(sinks)[h])
            for i in range(n_queries):
                head = rows.head(b, h // gqa)
                at = output[b, h, i]
                at[:], spread = head.attend(scale * q[b, h, i], seen[b, 0, i], sink)
                bound[b, h, i] = TIMES * np.sqrt(spread) + np.linalg.norm(_half_unit(at, dtype))
    bound += np.sqrt(layout.v_head_dim) * LEAST[dtype]
    return Result(output, bound)


class _Rows:
    """Packed rows in float64, turbo rows in the rotated basis, anchors apart.

    Shapes:
        keys, values, v_scales: [B, H, n, head_dim]; a group's scale is repeated for its values.
    """

    def __init__(self, packed: AnyKV) -> None:
        layout, parts = packed.layout, parts_of(packed)
        read = [[x[:, :, own] for x in self._read(part)] for part, own in parts]
        self.keys, self.values, self.v_scales = (np.concatenate(x, axis=2) for x in zip(*read))
        self.anchors = None
        if packed.centre is not None:
            with mx.stream(mx.cpu):
                rows = packed.centre.rows(0, packed.n_tokens, packed.left_padding)
                self.anchors = np.broadcast_to(float64(rows), self.keys.shape)
        self.k_format, self.v_format = layout.k_format, layout.v_format
        half = layout.dtype != "float32"
        self.k_half = half and not self.k_format.is_f16 and layout.k_head_dim >= 4 * CHAIN
        self.v_half = half and any(_folds_scales(part) for part, _ in parts)

    @staticmethod
    def _read(part: PackedKV) -> list[np.ndarray]:
        with mx.stream(mx.cpu):
            keys, values = (float64(x) for x in reference._rotated(part.tiles, part))
            scales = float64(tiles_to_rows(part.tiles, part.layout).v_scales)
        n, dim = part.n_tokens, values.shape[-1]
        each = np.repeat(scales, part.layout.v_format.group_width(dim) or dim, axis=-1)
        return [keys, values, each[:, :, :n, :dim]]

    def head(self, b: int, h: int) -> _Head:
        anchors = None if self.anchors is None else self.anchors[b, h]
        return _Head(self, self.keys[b, h], self.values[b, h], self.v_scales[b, h], anchors)


class _Head(NamedTuple):
    rows: _Rows
    keys: np.ndarray
    values: np.ndarray
    v_scales: np.ndarray
    anchors: np.ndarray | None

    def attend(self, q: np.ndarray, seen: np.ndarray, sink: float | None):
        """Attention of one query, and the sum of the squares of all that may move it."""
        own = _rotated(q, self.rows.k_format)
        scores = self.keys @ own
        sizes = np.abs(self.keys) @ np.abs(own)
        if self.anchors is not None:
            scores = scores + self.anchors @ q
            sizes = sizes + np.abs(self.anchors) @ np.abs(q)
        scores = np.where(seen, scores, -np.inf)
        top = max(scores.max(), -1e30 if sink is None else sink)
        weights = np.exp(scores - top)
        total = weights.sum() + (0.0 if sink is None else np.exp(sink - top))
        p = weights / (total or 1.0)
        output = p @ self.values
        away = self.values - output
        distance = np.square(away).sum(-1)
        squares = np.square(FLOAT * (1 + sizes))  # of the errors of scores
        spread = np.square(p) @ (squares * distance)
        spread += np.square(FLOAT) * (np.square(output).sum() + np.square(p) @ self._sizes())
        if self.rows.k_half:
            roundings = self._key_roundings(own)
            spread += np.square(p) @ (roundings * distance)
            moved = (self.keys * p[:, None]).T @ away
            largest = np.abs(q).max()  # queries are half after division by it
            each = np.maximum(HALF * np.abs(own), 2.0**-25 * largest)
            spread += np.square(each) @ np.square(moved).sum(-1)
            squares += roundings + np.square(self.keys) @ np.square(each)
        # where an error of a score is large, so is what is beyond its first order
        error = TIMES * np.sqrt(squares)
        beyond = np.expm1(np.minimum(error, 600)) - error
        spread += np.square(p * beyond / TIMES) @ distance
        if self.rows.v_half:
            spread += self._value_roundings(p)
        return _rotated(output, self.rows.v_format, inverse=True), spread

    def _sizes(self) -> np.ndarray:
        return np.square(self.values).sum(-1)

    def _key_roundings(self, q: np.ndarray) -> np.ndarray:
        """Sums of squares of the roundings of each key's score, but those of the query."""
        products = _padded(self.keys * q, 2 * CHAIN, 1)
        n = len(products)
        # of two neighbouring dims each is summed by itself, and two such sums are added
        sums = products.reshape(n, -1, 2, CHAIN // 2, 2).cumsum(axis=3)
        squares = np.square(sums).sum(axis=(1, 2, 3, 4))
        squares += np.square(sums[:, :, :, -1].sum(axis=2)).sum(axis=(1, 2))
        squares += np.square(products).sum(-1)  # levels are half
        return HALF**2 * squares

    def _value_roundings(self, p: np.ndarray) -> float:
        """The sum of squares of the roundings of weights, levels, and sums over tokens."""
        products = _padded(self.values * p[:, None], 2 * CHAIN_TOKENS, 0)
        sums = products.reshape(-1, 2, CHAIN_TOKENS, products.shape[1]).cumsum(axis=2)
        squares = np.square(sums).sum() + np.square(sums[:, :, -1].sum(axis=1)).sum()
        squares += 2 * np.square(products).sum()
        # weights, times the scale, that are subnormal in half
        scaled, scales = p[:, None] * self.v_scales, self.v_scales
        levels = np.divide(self.values, scales, out=np.zeros_like(self.values), where=scales > 0)
        lost = (
            2.0 ** -(25 + HEADROOM) * scaled.max(initial=0) * (p[:, None] > 0) * (1 + abs(levels))
        )
        return HALF**2 * squares + np.square(lost).sum()


def _folds_scales(part: PackedKV) -> bool:
    """Whether V's scales are a part of the weights, whose products are half then."""
    fmt, dim = part.layout.v_format, part.layout.v_head_dim
    return fmt.is_turbo and (fmt.n_groups(dim) == 1 or fmt.group_width(dim) == 128)


def _half_unit(x: np.ndarray, dtype: str) -> np.ndarray:
    """What rounding to nearest may change numbers by; of those below a power of two, as above."""
    _, exponent = np.frexp(x * (1 + 2.0**-6))
    return np.where(x == 0, 0, 2.0 ** (exponent - 1.0 - DIGITS[dtype]))


def _padded(x: np.ndarray, multiple: int, axis: int) -> np.ndarray:
    widths = [(0, 0), (0, 0)]
    widths[axis] = 0, -x.shape[axis] % multiple
    return np.pad(x, widths)


def _rotated(x: np.ndarray, fmt: KVFormat, inverse: bool = False) -> np.ndarray:
    return rotated(x, inverse) if fmt.is_turbo else x
