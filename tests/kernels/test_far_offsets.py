"""Offsets of heads and rows beyond 2^32 elements, on buffers whose second half lies far away."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from metal_host import HostMetal, Recorder
from metal_host.build import compile_kernel
from metal_host.executor import _buffers

from mlx_turbokv.kernels import assemble, decode, dequantize, pack, reference
from mlx_turbokv.kernels.packed import PackedKV
from mlx_turbokv.kernels.segment_rows import segment_rows
from mlx_turbokv.kernels.segments import SegmentedKV
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import TILE, KVLayout, protected_layout

DIM, N_HEADS = 64, 2
LAYOUT = KVLayout(KVFormat.parse("turbo4"), KVFormat.parse("q8_0"), DIM, DIM, "float16")
FAR = 2**32 + 2**20  # elements, more than 32 bits count with or without a sign
FAR_TILES = FAR // LAYOUT.tile_words + 1
FAR_ROWS = FAR // DIM + 1
FINE = protected_layout(LAYOUT)
FAR_FINE_TILES = FAR // FINE.tile_words + 1
N_PACKED = 84


def rows(n: int, seed: int, n_heads: int = N_HEADS) -> mx.array:
    return mx.random.normal((1, n_heads, n, DIM), key=mx.random.key(seed)).astype(mx.float16)


def packed() -> PackedKV:
    """Two tiles of each head in the body, one in the tail."""
    tiles = [reference.pack(rows(n, n), rows(n, n + 1), LAYOUT) for n in (64, 20)]
    return PackedKV(LAYOUT, tiles[0], 64, tiles[1], 20)


def run_pack() -> None:
    pack.pack(rows(8, 1), rows(8, 2), LAYOUT, packed().tail, 20)


def run_pack_of_whole_tiles() -> None:
    pack.pack(rows(32, 1), rows(32, 2), LAYOUT)


def run_decode() -> None:
    decode.decode(rows(1, 3, 2 * N_HEADS), packed(), 0.125)


def run_dequantize() -> None:
    dequantize.rotated_rows(packed(), mx.float16, 0, N_HEADS, "metal")


def run_dequantize_of_whole_tiles() -> None:
    dequantize.rotated_rows(packed()._replace(n_tail=0), mx.float16, 0, N_HEADS, "metal")


def segmented() -> SegmentedKV:
    """First tokens, two tiles of each head in the body, and a tail."""
    sink, tail = (reference.pack(rows(n, n), rows(n, n + 1), FINE) for n in (32, 20))
    return SegmentedKV(
        LAYOUT, FINE, FINE, sink, 32, N_PACKED, packed().body, 64, tail, 64, 20, (64,), (0,), None,
        (rows(32, 5), rows(32, 6)),
    )  # fmt: skip


def run_segments() -> None:
    segment_rows(segmented(), mx.float16, (0, N_HEADS), "metal")


def run_segments_of_whole_tiles() -> None:
    """So many new rows that the last tile is full."""
    n = -N_PACKED % TILE
    whole = segmented()._replace(fresh=(rows(n, 5), rows(n, 6)))
    segment_rows(whole, mx.float16, (0, N_HEADS), "metal")


TILES, HALVES = 4 * LAYOUT.tile_words * FAR_TILES, 2 * DIM * FAR_ROWS
# parameters that are made huge: their place, in the order of the kernel's file, and new value; the
# buffers whose second head is then so many bytes away
CASES = [
    (run_pack, {2: FAR_TILES}, {"tail": TILES}),
    (run_pack, {3: FAR_TILES}, {"packed": TILES}),
    (run_pack_of_whole_tiles, {0: FAR_ROWS}, {"keys": HALVES, "values": HALVES}),
    (run_decode, {4: FAR_TILES}, {"body": TILES}),
    (run_decode, {6: FAR_TILES}, {"tail": TILES}),
    (run_dequantize, {3: FAR_TILES}, {"body": TILES}),
    (run_dequantize, {5: FAR_TILES}, {"tail": TILES}),
    (run_dequantize_of_whole_tiles, {6: FAR_ROWS}, {"keys": HALVES, "values": HALVES}),
    (run_segments, {4: FAR_FINE_TILES}, {"sink": 4 * FINE.tile_words * FAR_FINE_TILES}),
    (run_segments, {5: FAR_TILES}, {"body": TILES}),
    (run_segments, {6: FAR_FINE_TILES}, {"tail": 4 * FINE.tile_words * FAR_FINE_TILES}),
    (
        run_segments_of_whole_tiles,
        {11: FAR_ROWS},
        {
            **dict.fromkeys(("keys", "values"), HALVES),
            **dict.fromkeys(("fresh_keys", "fresh_values"), HALVES - 2 * DIM * N_PACKED),
        },
    ),
]
NAMES = ["pack tail", "pack output", "pack rows", "decode body", "decode tail"]
NAMES += ["dequantize body", "dequantize tail", "dequantize output"]
NAMES += ["segments sink", "segments body", "segments tail", "segments rows"]


@pytest.mark.parametrize(("run", "changed", "far"), CASES, ids=NAMES)
def test_a_head_far_away_is_reached(monkeypatch, run, changed, far) -> None:
    recorder = Recorder()
    monkeypatch.setattr(assemble, "factory", recorder.metal_kernel)
    run()
    (launch,) = recorder.launches
    host = HostMetal(runs=[("asan", "forward", 0)])
    expected = host.run(launch)
    params = np.array(launch.inputs["params"])
    for place, value in changed.items():
        params[place] = value
    launch = replace(launch, inputs={**launch.inputs, "params": mx.array(params)})
    compiled = compile_kernel(launch.text, launch.name)
    buffers = _buffers(compiled, launch)
    for buffer in buffers:
        buffer.second = far.get(buffer.name, 0)
    assert sum(buffer.second > 0 for buffer in buffers) == len(far)
    got = host.run_buffers(compiled, launch.grid, launch.threadgroup, buffers)
    host.close()
    for a, b in zip(got, expected):
        assert a.any()
        np.testing.assert_array_equal(a, b)
