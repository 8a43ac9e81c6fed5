"""The stored layout, bit by bit, against a writer that follows layout.py's words in NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_turbokv import KVFormat
from mlx_turbokv.quant import tiles
from mlx_turbokv.quant.layout import TILE, KVLayout

NAMES = ("f16", "q8_0", "turbo2", "turbo3", "turbo4", "turbo5", "turbo6", "turbo2:32", "turbo5:32")
HEAD_DIMS = (64, 72, 80, 96, 112, 128, 192, 256)


def stream_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """A bitstream of codes, the first one lowest; the last axis becomes bits."""
    planes = (codes[..., None].astype(np.uint64) >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    return planes.astype(np.uint8).reshape(*codes.shape[:-1], -1)


def write_tile(k_codes, k_scales, v_codes, v_scales, layout: KVLayout) -> np.ndarray:
    """The bytes of one tile from [32, D] codes and [32, groups] scales."""
    k_bits = 8 * layout.itemsize if layout.k_format.is_f16 else layout.k_format.bits
    rows = np.packbits(stream_bits(k_codes, k_bits), axis=-1, bitorder="little")
    out, start = [], 0
    remainder = [w for w in (8, 4, 2, 1) if rows.shape[1] % 16 & w]
    for width in [16] * (rows.shape[1] // 16) + remainder:
        for token in range(TILE):
            out.append(rows[token, start : start + width])
        start += width
    out.append(np.ascontiguousarray(k_scales.T).view(np.uint8).ravel())
    v_bits = layout.v_code_bits
    vec4s = v_codes.reshape(TILE, -1, 4).transpose(1, 0, 2)
    streams = np.packbits(
        stream_bits(vec4s.reshape(len(vec4s), -1), v_bits), axis=-1, bitorder="little"
    )
    for column in range(v_bits):
        for vec4 in streams:
            out.append(vec4[16 * column : 16 * column + 16])
    out.append(np.ascontiguousarray(v_scales.T).view(np.uint8).ravel())
    return np.concatenate(out)


def random_rows(rng, n: int, layout: KVLayout):
    """Codes and scales of n rows, one head, and the same as `Rows`."""
    parts = []
    for fmt, dim in ((layout.k_format, layout.k_head_dim), (layout.v_format, layout.v_head_dim)):
        bits = tiles.code_bits(fmt, layout.itemsize)
        codes = rng.integers(0, 1 << bits, (n, dim), dtype=np.uint64)
        scales = rng.standard_normal((n, fmt.n_groups(dim))).astype(np.float16)
        dtype = {8: np.uint8, 16: np.uint16, 32: np.uint32}.get(bits, np.uint8)
        units = tiles.units_from_codes(mx.array(codes.astype(dtype)), bits)
        parts.append((codes, scales, units[None, None], mx.array(scales)[None, None]))
    (kc, ks, ku, kms), (vc, vs, vu, vms) = parts
    return (kc, ks, vc, vs), tiles.Rows(ku, kms, vu, vms)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("index", range(len(NAMES)))
def test_tiles_are_the_documented_bytes(index, head_dim):
    k, v = NAMES[index], NAMES[(index + 4) % len(NAMES)]
    v_head_dim = 64 if head_dim == 192 else head_dim
    dtype = ("float16", "float32")[index % 2]
    layout = KVLayout(KVFormat.parse(k), KVFormat.parse(v), head_dim, v_head_dim, dtype)
    raw, rows = random_rows(np.random.default_rng(index), TILE, layout)
    packed = np.array(tiles.rows_to_tiles(rows, layout)).reshape(-1)
    assert np.array_equal(packed.view(np.uint8), write_tile(*raw, layout))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.sampled_from(HEAD_DIMS),
    st.integers(1, 100),
    st.integers(0, 2**32 - 1),
)
def test_rows_survive_tiles(k, v, head_dim, n, seed):
    layout = KVLayout(KVFormat.parse(k), KVFormat.parse(v), head_dim, head_dim)
    _, rows = random_rows(np.random.default_rng(seed), n, layout)
    packed = tiles.rows_to_tiles(rows, layout)
    assert packed.shape == (1, 1, -(-n // TILE), layout.tile_words)
    back = tiles.tiles_to_rows(packed, layout)
    for given_part, part in zip(rows, back):
        as_bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[part.dtype.size]
        assert mx.array_equal(given_part.view(as_bits), part[:, :, :n].view(as_bits)).item()
        assert not part[:, :, n:].view(as_bits).any().item()


@pytest.mark.parametrize("pair", [("turbo3", "turbo5"), ("q8_0", "turbo2"), ("f16", "turbo6:32")])
@pytest.mark.parametrize("n_rows", [1, 7, 31])
def test_first_rows_mask_keeps_those_rows_alone(pair, n_rows):
    layout = KVLayout(*map(KVFormat.parse, pair), 80, 64)
    _, rows = random_rows(np.random.default_rng(3), TILE, layout)
    kept = tiles.rows_to_tiles(rows, layout) & tiles.first_rows_mask(layout, n_rows)
    expected = tiles.rows_to_tiles(tiles.Rows(*(part[:, :, :n_rows] for part in rows)), layout)
    assert mx.array_equal(kept, expected).item()
