"""Launches refuse counts, shapes and types that would let a kernel read outside its arrays."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.kernels import assemble
from mlx_turbokv.kernels.backend import select_backend
from mlx_turbokv.kernels.packed import PackedKV
from mlx_turbokv.kernels.segments import SegmentedKV
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout, protected_layout

LAYOUT = KVLayout(KVFormat.parse("turbo4"), KVFormat.parse("turbo2"), 64, 128, "float16")
BATCH, HEADS = 2, 3


@pytest.fixture(params=["traced", "called", "reference"])
def backend(request, monkeypatch):
    """Back-ends whose kernels must not be reached, launched by a trace and without one."""

    def metal_kernel(**_):
        def kernel(**_):
            raise AssertionError("the kernel was launched")

        return kernel

    if request.param == "reference":
        return select_backend("reference")
    monkeypatch.setattr(assemble, "factory", metal_kernel)
    if request.param == "traced":
        monkeypatch.setattr(assemble, "replayed", lambda launch, backend: mx.compile(launch))
    return select_backend("metal")


def tiles(n: int, batch=BATCH, heads=HEADS, words=LAYOUT.tile_words, dtype=mx.uint32):
    return mx.zeros((batch, heads, n, words), dtype)


def a_centre(heads=HEADS, dim=64) -> Centre:
    return Centre(
        mx.ones((heads, dim)), RopeFrequencies.from_arguments(dim, dim, False, 1e4), "test"
    )


PADDING = mx.array([0, 2], mx.int32)
RIGHT = PackedKV(LAYOUT, tiles(4), 128, tiles(2), 40, a_centre(), PADDING)
PACKED = [
    {"n_tail": 65},
    {"n_tail": 1000},
    {"n_tail": -1},
    {"n_body": 160},
    {"n_body": 100},
    {"n_body": -32},
    {"n_body": 0, "n_tail": 0},
    {"body": tiles(4, heads=HEADS + 1)},
    {"body": tiles(4, batch=1)},
    {"body": tiles(4, words=LAYOUT.tile_words - 1)},
    {"tail": tiles(2, words=LAYOUT.tile_words + 1)},
    {"tail": tiles(2, dtype=mx.int32)},
    {"tail": tiles(2, dtype=mx.uint16)},
    {"tail": tiles(2, batch=1)},
    {"centre": a_centre(heads=1)},
    {"centre": a_centre(dim=128)},
    {"left_padding": mx.zeros((9,), mx.int32)},
    {"left_padding": mx.zeros((BATCH,), mx.float32)},
    {"left_padding": mx.zeros((BATCH, 8), mx.int32)},
]


def attend(backend, queries, packed, **options):
    attention = backend.decode or backend.attention
    return attention(queries, packed, 0.1, **options)


def queries(batch=BATCH, heads=2 * HEADS, n=1, dim=64):
    return mx.zeros((batch, heads, n, dim), mx.float16)


@pytest.mark.parametrize("change", PACKED, ids=lambda c: ",".join(c))
def test_packed_rows_that_do_not_fit_are_not_read(backend, change):
    packed = RIGHT._replace(**change)
    with pytest.raises(ValueError):
        attend(backend, queries(), packed, left_padding=packed.left_padding)
    with pytest.raises(ValueError):
        backend.dequantize(packed, mx.float16)
    if backend.rotated_rows:
        with pytest.raises(ValueError):
            backend.rotated_rows(packed, mx.float16, 0, HEADS)


FINE = protected_layout(LAYOUT)
SEGMENTED = SegmentedKV(
    LAYOUT, FINE, FINE, tiles(1, words=FINE.tile_words), 32, 200, tiles(4), 128,
    tiles(3, words=FINE.tile_words), 128, 72, (128, 128), (0, 2), a_centre(),
)  # fmt: skip
SEGMENTS = [
    {"n_tail": 97},
    {"n_body": 160},
    {"tail_start": 100},
    {"tail_start": 160},
    {"coarse_end": (128, 129)},
    {"coarse_end": (128,)},
    {"coarse_end": (128, -1)},
    {"tail_start": 32, "n_tail": 20, "n_sunk": 52},
    {"n_sunk": 201},
    {"n_sink": 64},
    {"tail": tiles(3)},
    {"sink": tiles(1)},
    {"sink": tiles(1, words=FINE.tile_words, heads=HEADS + 1)},
    {"body": tiles(4, dtype=mx.int32)},
    {"fresh": (queries(heads=HEADS), queries(heads=HEADS, dim=128))},
]
# rows that are not packed may be read, if they fit
ROWS_OF_SEGMENTS = [
    {"starts": (0,)},
    {"fresh": (queries(heads=HEADS), queries(heads=HEADS, dim=64))},
    {"fresh": (queries(heads=HEADS), queries(heads=1, dim=128))},
    {"fresh": (queries(heads=HEADS), queries(heads=HEADS, n=2, dim=128))},
    {"centre": a_centre(heads=1)},
]


@pytest.mark.parametrize("backend", ["traced", "called"], indirect=True)
@pytest.mark.parametrize("change", SEGMENTS, ids=lambda c: ",".join(c))
def test_protected_rows_that_do_not_fit_are_not_read(backend, change):
    packed = SEGMENTED._replace(**change)
    with pytest.raises(ValueError):
        attend(backend, queries(), packed, left_padding=packed.left_padding)


@pytest.mark.parametrize("backend", ["traced", "called"], indirect=True)
@pytest.mark.parametrize("change", [*SEGMENTS[:-1], *ROWS_OF_SEGMENTS], ids=lambda c: ",".join(c))
def test_rows_of_segments_that_do_not_fit_are_not_read(backend, change):
    with pytest.raises(ValueError):
        backend.rotated_rows(SEGMENTED._replace(**change), mx.float16, 0, HEADS)


@pytest.mark.parametrize(
    "given",
    [
        queries(dim=128),
        queries(batch=1),
        queries(heads=HEADS + 1),
        queries(heads=2),
        queries(n=0),
    ],
    ids=lambda x: str(x.shape),
)
def test_queries_that_do_not_fit_are_refused(backend, given):
    with pytest.raises(ValueError):
        attend(backend, given, RIGHT)


@pytest.mark.parametrize("n", [1, 9, 12])
def test_sinks_of_other_heads_are_refused(backend, n):
    many = RIGHT._replace(body=tiles(4, heads=5), tail=tiles(2, heads=5), centre=None)
    with pytest.raises(ValueError):
        attend(backend, queries(heads=10), many, sinks=mx.zeros((n,), mx.float16))


@pytest.mark.parametrize("n", [1, 5, 8])
def test_sinks_of_fewer_than_eight_heads_are_counted_too(backend, n):
    with pytest.raises(ValueError):
        attend(backend, queries(), RIGHT, sinks=mx.zeros((n,), mx.float16))


@pytest.mark.parametrize("backend", ["traced", "called"], indirect=True)
def test_heads_that_are_not_there_are_refused(backend):
    for first, count in ((0, HEADS + 1), (HEADS, 1), (-1, 2), (0, 0)):
        for packed in (RIGHT, SEGMENTED):
            with pytest.raises(ValueError):
                backend.rotated_rows(packed, mx.float16, first, count)


def rows(n=3, batch=BATCH, heads=HEADS, dim=64):
    return mx.zeros((batch, heads, n, dim), mx.float16)


NEW = [
    {"keys": rows(dim=128)},
    {"values": rows(dim=64)},
    {"values": rows(4, dim=128)},
    {"values": rows(dim=128, heads=1)},
    {"tail": tiles(1), "n_tail": 33},
    {"tail": tiles(1), "n_tail": -1},
    {"tail": None, "n_tail": 5},
    {"tail": tiles(1, heads=1), "n_tail": 5},
    {"tail": tiles(1, batch=1), "n_tail": 5},
    {"tail": tiles(1, words=8), "n_tail": 5},
    {"tail": tiles(1, dtype=mx.float32), "n_tail": 5},
    {"centre": a_centre(heads=1)},
    {"centre": a_centre(dim=128)},
    {"centre": a_centre(), "left_padding": mx.zeros((9,), mx.int32)},
    {"centre": a_centre(), "left_padding": mx.zeros((BATCH,), mx.float32)},
    {"part": (0, 4)},
    {"part": (2, 2)},
    {"part": (-1, 3)},
    {"part": (0, 2)},
    {"tail": tiles(1), "n_tail": 30, "part": (1, 3)},
]


@pytest.mark.parametrize("change", NEW, ids=lambda c: ",".join(c))
def test_new_rows_that_do_not_fit_are_not_packed(backend, change):
    given = {"keys": rows(), "values": rows(dim=128), "layout": LAYOUT, **change}
    with pytest.raises(ValueError):
        backend.pack(**given)


def test_left_padding_of_too_few_sequences_is_refused(backend):
    """Kernels are given at least 8 numbers, so this needs more than 8 sequences."""
    wide = RIGHT._replace(body=tiles(4, batch=12), tail=tiles(2, batch=12), left_padding=PADDING)
    with pytest.raises(ValueError):
        attend(backend, queries(batch=12), wide, left_padding=PADDING)
    with pytest.raises(ValueError):
        backend.dequantize(wide, mx.float16)
    with pytest.raises(ValueError):
        given = rows(batch=12), rows(batch=12, dim=128), LAYOUT
        backend.pack(*given, centre=a_centre(), left_padding=PADDING)
