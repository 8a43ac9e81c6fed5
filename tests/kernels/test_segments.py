"""Rows of three segments, as a prefill's attention reads them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turbokv.centring.centre import BLOCK, Centre, block_means
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.kernels import reference
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.kernels.segments import SegmentedKV, all_rows
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import TILE, KVLayout, protected_layout
from mlx_turbokv.quant.rotation import rotation_matrix

LAYOUT = KVLayout(KVFormat.parse("turbo4"), KVFormat.parse("turbo3"), 64, 64, "float16")
FINE = protected_layout(LAYOUT)
N_FIRST, N_BODY, N_TAIL, N_FRESH = 32, 16384, 160, 512
BODY, TAIL, FIRST, FRESH = 1.0, 2.0, 3.0, 4.0
ANCHOR_ATOL = 1e-5  # float32 sums of 64 products of numbers up to 4


def segmented(n_body: int) -> SegmentedKV:
    """Rows of each segment, and some that are not packed; what the tiles hold is never read."""
    first, body, tail = (
        mx.zeros((1, 2, n // TILE, layout.tile_words), mx.uint32)
        for n, layout in ((N_FIRST, FINE), (n_body, LAYOUT), (N_TAIL, FINE))
    )
    fresh = mx.full((1, 2, N_FRESH, 64), FRESH, mx.float16)
    n = n_body + N_TAIL
    kv = SegmentedKV(
        LAYOUT, FINE, FINE, first, N_FIRST, n, body, n_body, tail, n_body, N_TAIL, (n_body,), (0,),
        None, (fresh, fresh),
    )  # fmt: skip
    mx.eval(first, body, tail, fresh)
    return kv


def read(packed: PackedKV, dtype: mx.Dtype, first: int, count: int, room: int = 0, row: int = 0):
    """A back-end that says which segment it was asked for."""
    n = packed.n_tokens
    value = BODY if packed.layout == LAYOUT else (FIRST if n == N_FIRST else TAIL)
    keys, values = (mx.zeros((1, count, n + room, 64), dtype) for _ in range(2))
    return keys + value, values + value


def test_rows_are_in_memory_once() -> None:
    """Joined, they would be there twice."""
    kv = segmented(N_BODY)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    rows = all_rows(kv, (0, 2), read, mx.float16)
    mx.eval(rows)
    n_bytes = sum(x.nbytes for x in rows)
    assert 1 <= (mx.get_peak_memory() - before) / n_bytes < 1.2


@pytest.mark.parametrize("n_body", [0, 64, 1024])
def test_each_row_is_its_segments(n_body: int) -> None:
    kv, asked = segmented(n_body), {}

    def noted(packed: PackedKV, *arguments, room: int = 0, row: int = 0):
        asked[packed.n_tokens] = row
        return read(packed, *arguments, room)

    _, values = all_rows(kv, (1, 1), noted, mx.float16)
    assert asked == {N_FIRST: 0, N_TAIL: n_body, **({n_body: 0} if n_body else {})}
    at = mx.full((1, 1, kv.n_packed, 64), BODY, mx.float16)
    at[:, :, n_body:] = TAIL
    at[:, :, :N_FIRST] = FIRST
    assert values.shape == (1, 1, n_body + N_TAIL + N_FRESH, 64)
    assert mx.array_equal(values[:, :, : kv.n_packed], at).item()
    assert kv.fresh is not None and (kv.fresh[1] == FRESH).all().item()  # not written into


@given(
    n=st.integers(1, 200),
    row=st.integers(0, 600).map(lambda tiles: TILE * tiles),
    starts=st.lists(st.integers(0, 40_000), min_size=2, max_size=2),
    bare=st.booleans(),
)
def test_rows_from_any_row_on_have_the_anchors_of_their_positions(n, row, starts, bare) -> None:
    rope = RopeFrequencies.from_arguments(64, 64, False, 1e4)
    mu = np.linspace(-2, 2, 128).reshape(2, 64)
    centre = Centre(mx.array(mu, mx.float32), rope, "test", first_key_uncentred=bare)
    tiles = mx.zeros((2, 2, -(-n // TILE), LAYOUT.tile_words), mx.uint32)  # scales of 0
    padding = mx.array(starts, mx.int32) if any(starts) else None
    packed = PackedKV(LAYOUT, empty_tiles(), 0, tiles, n, centre, padding)
    keys, values = reference._segment(packed, mx.float32, 0, 2, row=row)
    assert not np.array(values).any()
    # of the mean of RoPE(mu) over each block, in the rotated basis
    table = block_means(rope, (row + n) // BLOCK + 1).astype(np.float64)
    positions = row + np.arange(n) - np.array(starts)[:, None]
    cosine, sine = np.moveaxis(table[np.maximum(positions, 0) // BLOCK], -1, 0)[:, :, None]
    x, y = mu[:, None, :32], mu[:, None, 32:]
    anchors = np.concatenate([x * cosine - y * sine, x * sine + y * cosine], axis=-1)
    anchors[np.broadcast_to((positions < bare)[:, None], anchors.shape[:3])] = 0
    want = anchors @ rotation_matrix(64).T
    np.testing.assert_allclose(np.array(keys), want, rtol=0, atol=ANCHOR_ATOL)
