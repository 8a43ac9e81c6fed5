"""Launches that are traced once: what differs from step to step still reaches them."""

from __future__ import annotations

from math import prod
from threading import Thread

import mlx.core as mx
import pytest

from mlx_turbokv.kernels import assemble, decode, decode_launch, dequantize, pack, segment_rows
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.kernels.segments import SegmentedKV
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout, protected_layout

LAYOUT = KVLayout(KVFormat.parse("q8_0"), KVFormat.parse("turbo2"), 64, 64, "float16")
FINE = protected_layout(LAYOUT)


@pytest.fixture
def calls(monkeypatch):
    """Kernels that write the sum of all they are given; the names of those that were called."""
    named = []

    def metal_kernel(name, input_names, output_names, source, header):
        def kernel(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            named.append(name.removeprefix("turbokv_"))
            total = sum(x.astype(mx.uint32).sum() for x in inputs) % 2048
            return [
                mx.where(mx.arange(prod(shape)) == 0, total, 0).reshape(shape).astype(dtype)
                for shape, dtype in zip(output_shapes, output_dtypes)
            ]

        return kernel

    def forget():
        decodes = decode_launch.launch_for, decode_launch._call
        for cached in (assemble._build, pack._launch, *decodes):
            cached.cache_clear()
        dequantize._launch.cache_clear()
        segment_rows._launch.cache_clear()
        dequantize._restoring.cache_clear()

    forget()
    monkeypatch.setattr(assemble, "factory", None)
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    yield named
    forget()


def _tiles(n_tiles: int, fill: int = 0) -> mx.array:
    return mx.full((1, 2, n_tiles, LAYOUT.tile_words), fill, mx.uint32)


def _rows(n: int, fill: float = 0.0) -> mx.array:
    return mx.full((1, 2, n, 64), fill, mx.float16)


def test_tokens_of_one_tile_are_packed_by_one_trace(calls) -> None:
    first = [pack.pack(_rows(1), _rows(1), LAYOUT, _tiles(1), n_tail) for n_tail in (1, 2, 31)]
    assert calls == ["pack"]
    assert all(tiles.shape == (1, 2, 1, LAYOUT.tile_words) for tiles in first)
    counts = [tiles[0, 0, 0, 0].item() for tiles in first]
    assert [n - counts[0] for n in counts] == [0, 1, 30]


def test_another_number_of_tiles_or_tokens_is_traced_anew(calls) -> None:
    for n_new, tail, n_tail in ((1, 1, 31), (1, 1, 32), (2, 1, 2), (1, 2, 40)):
        tiles = pack.pack(_rows(n_new), _rows(n_new), LAYOUT, _tiles(tail), n_tail)
        assert tiles.shape[2] == -(-(n_tail + n_new) // 32)
    assert calls == ["pack"] * 4


def test_layers_and_steps_of_a_tile_share_the_traces_of_decode(calls) -> None:
    queries, sums = mx.zeros((1, 4, 1, 64), mx.float16), []
    for n_tail in (3, 9):
        for fill in (0, 2):
            packed = PackedKV(LAYOUT, _tiles(2), 64, _tiles(1, fill), n_tail)
            sums.append(decode.decode(queries, packed, 1.0, splits=2)[0, 0, 0, 0].item())
    assert calls == ["decode_partial", "decode_merge"]
    assert len(set(sums)) == 4


def test_a_longer_body_is_attended_by_a_trace_of_its_own(calls) -> None:
    queries = mx.zeros((1, 4, 1, 64), mx.float16)
    for n_tiles in (2, 3):
        decode.decode(
            queries, PackedKV(LAYOUT, _tiles(n_tiles), 32 * n_tiles, empty_tiles(), 0), 1.0
        )
    assert calls == ["decode_partial"] * 2


@pytest.mark.parametrize("n_body", [0, 64])
def test_dequantised_rows_are_those_held_whatever_the_trace(calls, n_body: int) -> None:
    body = _tiles(2) if n_body else None
    for n_tail in (1, 7, 32):
        packed = PackedKV(LAYOUT, body, n_body, _tiles(2), n_tail)
        keys, values = dequantize.dequantize(packed, mx.float16)
        assert keys.shape == values.shape == (1, 2, n_body + n_tail, 64)
    assert calls == ["dequantize"] * 2  # 1 and 7 rows are cut from two tiles, 32 are whole


def test_layers_share_the_traces_of_a_chunks_older_rows(calls) -> None:
    sums = []
    for fill in (0, 2, 4):
        kv = SegmentedKV(
            LAYOUT, LAYOUT, FINE, empty_tiles(), 0, 0, _tiles(2), 64, _tiles(1, fill), 64, 3,
            (64,), (0,), None, (_rows(5), _rows(5)),
        )  # fmt: skip
        sides = segment_rows.segment_rows(kv, mx.float16, (0, 2), "metal")
        assert [rows.shape for rows in sides] == [(1, 2, 72, 64)] * 2
        sums.append([rows[0, 0, 0, 0].item() for rows in sides])
    assert calls == ["read_segments"]
    assert len({k for k, _ in sums}) == len({v for _, v in sums}) == 3


def test_a_kernel_on_the_cpu_is_called_each_time(monkeypatch, metal_host) -> None:
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    seen = []
    launch = assemble.replayed(lambda x: seen.append(1) or x, "metal")
    launch(mx.zeros(1)), launch(mx.zeros(1))
    assert len(seen) == 2


def test_a_launch_in_place_of_one_that_another_thread_dropped_is_traced_anew(monkeypatch) -> None:
    """MLX knows a trace by its function's address, and has traces of their own for each thread."""
    monkeypatch.setattr(assemble, "factory", None)
    for i in range(50):
        held = [assemble.replayed(lambda x, i=i: x + i, "metal")]
        assert held[0](mx.zeros(1)).item() == i
        thread = Thread(target=held.clear)
        thread.start()
        thread.join()
