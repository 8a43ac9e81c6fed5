"""The small fixed inputs of selfcheck.py.

They have what goes wrong in kernels: several sequences and heads, rows of zeros and of extreme
sizes, more tokens than all SIMD groups take in one round, and queries that each look for another
token, at the edges of tiles, body and tail. What must not be read is NaN: rows behind the last one,
and the memory around every array.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..centring.centre import Centre
from ..centring.rope import RopeFrequencies
from ..centring.scales import PairScales
from ..quant.layout import TILE, KVLayout
from ..quant.tiles import first_rows_mask
from . import reference
from .packed import PackedKV
from .trust import Kernel

BATCH, N_KV_HEADS = 2, 2
N_BODY, N_TAIL = 35 * TILE, 37
N_TOKENS = N_BODY + N_TAIL
PADDING = (0, TILE + 5)  # rows before the first token of each sequence
LOUD = 50.0  # keys of the padding, over others
SINK = 7.0  # a logit that weighs about as much as all tokens that a query does not look for
# one dim of all keys, and a score that it gives all of them: exp of it is no float32
SAME, LOW_SCORE = 8.0, -136.0
ONES = 0xFFFFFFFF  # codes of all bits, and scales that are NaN


def normal(seed: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Normal values, the same for the same seed."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return mx.array(values.astype(np.float32)).astype(dtype)


def left_padding(*rows: int) -> mx.array:
    """Left padding of the sequences, the last ones'."""
    return mx.array([0] * (BATCH - len(rows)) + list(rows), mx.int32)


def centre_of(layout: KVLayout, centred: bool) -> Centre | None:
    """What keys are centred by."""
    if not centred:
        return None
    dim = layout.k_head_dim
    rng = np.random.default_rng(3)
    mu = 2 * rng.standard_normal((N_KV_HEADS, dim)).astype(np.float32)
    rope = RopeFrequencies.from_arguments(dim, dim, False, 1e4)
    of_pairs = np.exp(rng.normal(scale=0.4, size=(N_KV_HEADS, dim // 2))).astype(np.float32)
    return Centre(mx.array(mu), rope, "self-check", 1, True, PairScales(mx.array(of_pairs), rope))


def scales_of(centre: Centre | None) -> np.ndarray:
    """What keys are multiplied by.

    Shapes:
        returns: [N_KV_HEADS, 1, head_dim], or [1, 1, 1] where there are no scales.
    """
    if centre is None or centre.scales is None:
        return np.ones((1, 1, 1))
    return np.array(centre.scales.of_dims, np.float64)[:, None]


def rows(layout: KVLayout, n: int, centre: Centre | None) -> list[np.ndarray]:
    """Keys and values; centred keys have a constant part and are divided by their scales.

    Shapes:
        returns: [BATCH, N_KV_HEADS, n, head_dim] float64.
    """
    sides = []
    for seed, dim in ((1, layout.k_head_dim), (2, layout.v_head_dim)):
        rng = np.random.default_rng(seed)
        side = rng.standard_normal((BATCH, N_KV_HEADS, n, dim))
        sides.append(side * rng.uniform(0.7, 1.4, (BATCH, N_KV_HEADS, n, 1)))
    if centre is not None:
        sides[0] = (sides[0] + np.array(centre.rows(0, n))) / scales_of(centre)
    return sides


def with_magnitudes(side: np.ndarray, magnitudes: tuple[float, ...]) -> np.ndarray:
    """Rows of which the last of each head have these magnitudes."""
    for i, magnitude in enumerate(magnitudes, 1):
        row = side[:, :, -i]
        row *= magnitude / np.abs(row).max(axis=-1, keepdims=True)
    return side


@lru_cache(maxsize=8)
def packed(
    layout: KVLayout, centred: bool, padded: bool = False, low: bool = False
) -> tuple[np.ndarray, PackedKV]:
    """What queries can look for, and a body and a tail that the reference packed.

    The kernels of a layer share them.

    Args:
        padded: there is left padding of PADDING, whose keys are loud.
        low: all keys have the same value in their first dim.

    Shapes:
        returns: keys times their scales, less what they are centred by,
            [BATCH, N_KV_HEADS, N_TOKENS, k_head_dim].
    """
    centre = centre_of(layout, centred)
    padding = left_padding(*PADDING) if padded else None
    keys, values = rows(layout, N_TOKENS, centre)
    for b, n in enumerate(PADDING if padded else ()):
        keys[b, :, :n] *= LOUD
    if low:
        keys[..., 0] = SAME / scales_of(centre)[..., 0]
    options: dict[str, Any] = {}
    if centre is not None:
        options = {"centre": centre, "left_padding": padding}
    parts = []
    for first, last in ((0, N_BODY), (N_BODY, N_TOKENS)):
        own = {**options, "first": first} if options else {}
        k, v = (as_array(side[:, :, first:last], getattr(mx, layout.dtype))
                for side in (keys, values))  # fmt: skip
        parts.append(reference.pack(k, v, layout, **own))
    mx.eval(parts)  # another thread may ask for them next
    sought = keys * scales_of(centre)
    sought = sought if centre is None else sought - np.array(centre.rows(0, N_TOKENS))
    padding = padding if centre is not None else None
    return sought, PackedKV(layout, parts[0], N_BODY, parts[1], N_TAIL, centre, padding)


def as_array(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """An array of this type."""
    return mx.array(values.astype(np.float32)).astype(dtype)


def seeking(keys: np.ndarray, kernel: Kernel, low: bool = False) -> mx.array:
    """Queries that each give one token about half of all weight; the last one is zeros.

    Args:
        low: scores are all about LOW_SCORE.

    Shapes:
        keys: [BATCH, N_KV_HEADS, N_TOKENS, k_head_dim].
        returns: [BATCH, n_heads, n_queries, k_head_dim].
    """
    gqa_factor, n_queries = kernel.heads
    n_heads, dim = gqa_factor * N_KV_HEADS, keys.shape[-1]
    tokens = np.array([
        N_TOKENS - 1, N_BODY, N_BODY - 1, PADDING[1], 0, TILE, N_BODY + TILE, N_BODY // 2, 31, 33,
        N_TOKENS - 2, PADDING[1] - 1, N_BODY + TILE - 1,
    ])  # fmt: skip
    tokens = np.resize(tokens, BATCH * n_heads * n_queries).reshape(BATCH, n_heads, n_queries)
    own_head = np.arange(n_heads) // gqa_factor
    found = keys[np.arange(BATCH)[:, None, None], own_head[:, None], tokens]
    squares = np.square(found).sum(axis=-1, keepdims=True)
    found = found * np.log(N_TOKENS) * dim**0.5 / np.maximum(squares, 1e-6)
    found[-1, -1, -1] = 0
    if low:
        found[..., 0] = LOW_SCORE * dim**0.5 / SAME
    scales = scales_of(centre_of(kernel.layout, kernel.centred))
    found = found * (scales[own_head] if len(scales) > 1 else scales)
    return as_array(found, kernel.dtype)


def between_nan(array: mx.array, margin: int = 1) -> mx.array:
    """The same values in the middle of a larger buffer that is NaN, or has all bits set.

    A slice of the leading axis is handed to kernels as it is, without a copy.
    """
    fill = mx.full((margin, *array.shape[1:]), _nothing(array.dtype), array.dtype)
    whole = mx.concatenate([fill, array, fill])
    mx.eval(whole)
    return whole[margin : margin + len(array)]


def _nothing(dtype: mx.Dtype) -> float:
    if dtype == mx.uint32:
        return ONES
    return float("nan") if mx.issubdtype(dtype, mx.floating) else 1 << 24


def stale_after(tiles: mx.array, layout: KVLayout, n_rows: int) -> mx.array:
    """Tiles with stale rows behind the first ``n_rows``, and a stale tile."""
    if n_last := n_rows % TILE:
        mask = first_rows_mask(layout, n_last)
        last = (tiles[:, :, -1:] & mask) | ~mask
        tiles = mx.concatenate([tiles[:, :, :-1], last], axis=2)
    stale = mx.full((*tiles.shape[:2], 1, tiles.shape[-1]), ONES, mx.uint32)
    return mx.concatenate([tiles, stale], axis=2)


def walled(found: PackedKV) -> PackedKV:
    """The same rows with stale ones behind them, in buffers between NaN."""
    parts = (found.body, found.n_body), (found.tail, found.n_tail)
    body, tail = (between_nan(stale_after(tiles, found.layout, n)) for tiles, n in parts)
    padding = found.left_padding
    if padding is not None:
        padding = between_nan(padding)
    mx.eval(body, tail)
    return found._replace(body=body, tail=tail, left_padding=padding)
