"""The small inputs of selfcheck.py with protected tokens."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..quant.layout import TILE, KVLayout, protected_layout
from . import reference
from .segments import SegmentedKV
from .small_inputs import (
    BATCH,
    N_BODY,
    N_TOKENS,
    PADDING,
    SAME,
    as_array,
    between_nan,
    centre_of,
    packed,
    rows,
    scales_of,
    stale_after,
)

N_FIRST = TILE
TAIL_START = N_BODY - 2 * TILE
BODY_ENDS = (
    TAIL_START,
    TAIL_START + 7,
)  # the last sequence has rows in the body that the tail lacks


@lru_cache(maxsize=8)
def segmented(
    layout: KVLayout, centred: bool, padded: bool, low: bool, newest: bool
) -> tuple[np.ndarray, SegmentedKV]:
    """The rows of ``small_inputs.packed`` with protected first and, if ``newest``, newest tokens.

    Shapes:
        returns: keys as ``small_inputs.packed``.
    """
    fine, (sought, coarse) = protected_layout(layout), packed(layout, centred, padded, low)
    _, exact = packed(fine, centred, padded, low)
    starts = PADDING if padded else (0,) * BATCH
    first = _first_tokens(fine, centred, starts, low)
    start, ends = (TAIL_START, BODY_ENDS) if newest else (N_BODY, (N_BODY,) * BATCH)
    tail = exact.tiles[:, :, start // TILE :] if newest else coarse.tail
    mx.eval(first, tail)
    return sought, SegmentedKV(
        layout, fine if newest else layout, fine, first, N_FIRST, N_TOKENS, coarse.body, N_BODY,
        tail, start, N_TOKENS - start, ends, starts, coarse.centre,
    )  # fmt: skip


def _first_tokens(fine: KVLayout, centred: bool, starts: tuple[int, ...], low: bool) -> mx.array:
    """Tiles of each sequence's first tokens."""
    centre = centre_of(fine, centred)
    sides = rows(fine, N_TOKENS, centre)
    if low:
        sides[0][..., 0] = SAME / scales_of(centre)[..., 0]
    keys, values = (
        as_array(
            np.stack([x[:, n : n + N_FIRST] for x, n in zip(side, starts)]), getattr(mx, fine.dtype)
        )
        for side in sides
    )
    return reference.pack(keys, values, fine, centre=centre)


def walled(found: SegmentedKV) -> SegmentedKV:
    """The same rows with stale ones behind them, in buffers between NaN."""
    body = between_nan(stale_after(found.body, found.layout, found.n_body))
    tail = between_nan(stale_after(found.tail, found.tail_layout, found.n_tail))
    sink = between_nan(stale_after(found.sink, found.sink_layout, found.n_sink))
    return found._replace(body=body, tail=tail, sink=sink)
