"""The kernel variants that Metal's tuning uses, and the text that MLX generates for each.

Nothing is launched: the launchers run with a recorder in place of mx.fast.metal_kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mlx_turbokv  # noqa: E402, F401 - before mlx.core, so that OpenBLAS is used

# isort: split
import mlx.core as mx  # noqa: E402
from metal_host import Launch, Recorder  # noqa: E402

from mlx_turbokv.centring.centre import Centre  # noqa: E402
from mlx_turbokv.centring.rope import RopeFrequencies  # noqa: E402
from mlx_turbokv.kernels import assemble, decode, dequantize, pack  # noqa: E402
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles  # noqa: E402
from mlx_turbokv.kernels.segment_rows import segment_rows  # noqa: E402
from mlx_turbokv.kernels.segments import SegmentedKV  # noqa: E402
from mlx_turbokv.quant.formats import KVFormat  # noqa: E402
from mlx_turbokv.quant.layout import TILE, KVLayout, protected_layout  # noqa: E402

PAIRS = ("q8_0/turbo2", "turbo4/turbo3", "q8_0/q8_0", "turbo3/turbo2", "turbo4/turbo4")
PAIRS += ("turbo5/turbo5", "turbo6/turbo6")
HEAD_DIMS = (64, 80, 96, 128, 256)
ROWS = (1, 2, 4, 8)
SHORT_PAIRS, SHORT_HEAD_DIMS = PAIRS[:2], (128,)
N_KV_HEADS, N_TOKENS, N_SPLITS = 8, 4096, 4
# sequences and splits: with many sequences a threadgroup takes every row that it can; with one it
# may take fewer
HOW = {"split": (1, N_SPLITS), "whole": (16, 1), "alone": (1, 1)}
# the same with protected tokens
PROTECTED_HOW = {"protected": (1, N_SPLITS), "protected-whole": (16, 1)}
N_FIRST, N_NEWEST = 32, 128
THETA = 1e6
ATTENTION = ("decode_partial", "decode_protected")
KERNELS = (*ATTENTION, "decode_merge", "pack", "dequantize", "read_segments")


@dataclass(frozen=True)
class Variant:
    """One launch of a kernel.

    Args:
        name: of pair, head_dim, kernel and what else it depends on.
        rows: query rows of one KV head, of attention; 0 of other kernels.
        how: of attention, a key of HOW or of PROTECTED_HOW.
    """

    name: str
    kernel: str
    pair: str
    head_dim: int
    centred: bool
    rows: int
    how: str
    launch: Launch


def variants(
    pairs: Iterable[str] = PAIRS, head_dims: Iterable[int] = HEAD_DIMS, rows: Iterable[int] = ROWS
) -> Iterator[Variant]:
    """The variants of some pairs of formats, head dims and query rows.

    A text comes once for each number of rows; one sequence's only where no other case has it.
    """
    recorder, before = Recorder(), assemble.factory
    seen: dict[str, set[int]] = {}
    assemble.factory = recorder.metal_kernel
    try:
        for dim, pair, centred in product(head_dims, pairs, (False, True)):
            for variant in _of_pair(recorder, pair, dim, centred, tuple(rows)):
                rows_seen = seen.setdefault(variant.launch.text, set())
                if not rows_seen or (variant.rows not in rows_seen and variant.how != "alone"):
                    yield variant
                rows_seen.add(variant.rows)
    finally:
        assemble.factory = before
        recorder.close()


def _of_pair(
    recorder: Recorder, pair: str, dim: int, centred: bool, rows: tuple[int, ...]
) -> Iterator[Variant]:
    layout = KVLayout(*(KVFormat.parse(name) for name in pair.split("/")), dim, dim, "float16")
    rope = RopeFrequencies.from_arguments(dim, dim, False, THETA)
    centre = Centre(mx.zeros((N_KV_HEADS, dim)), rope, "zeros") if centred else None

    def view(batch: int) -> PackedKV:
        tiles = mx.zeros((batch, N_KV_HEADS, N_TOKENS // TILE, layout.tile_words), mx.uint32)
        return PackedKV(layout, tiles, N_TOKENS, empty_tiles(), 0, centre)

    def protected(batch: int) -> SegmentedKV:
        fine, start = protected_layout(layout), N_TOKENS - N_NEWEST
        first, body, tail = (
            mx.zeros((batch, N_KV_HEADS, n // TILE, own.tile_words), mx.uint32)
            for n, own in ((N_FIRST, fine), (start, layout), (N_NEWEST, fine))
        )
        return SegmentedKV(
            layout, fine, fine, first, N_FIRST, N_TOKENS, body, start, tail, start, N_NEWEST,
            (start,) * batch, (0,) * batch, centre,
        )  # fmt: skip

    def recorded(n_rows: int = 0, how: str = "") -> Iterator[Variant]:
        for launch in recorder.launches:
            kernel = next(name for name in KERNELS if f"_{name}_" in launch.name)
            about, parts = (0, ""), [pair, f"d{dim}", kernel.removeprefix("decode_")]
            if kernel in ATTENTION:
                about, parts[2:] = (n_rows, how), ["decode", f"rows{n_rows}", how]
            name = "-".join(parts + (["centred"] if centred and kernel != "decode_merge" else []))
            yield Variant(name, kernel, pair, dim, centred, *about, launch)
        recorder.launches.clear()

    for n_rows, (how, (batch, splits)) in product(rows, HOW.items()):
        queries = mx.zeros((batch, n_rows * N_KV_HEADS, 1, dim), mx.float16)
        decode.decode(queries, view(batch), dim**-0.5, backend="metal", splits=splits)
        yield from recorded(n_rows, how)
    for n_rows, (how, (batch, splits)) in product(rows, PROTECTED_HOW.items()):
        queries = mx.zeros((batch, n_rows * N_KV_HEADS, 1, dim), mx.float16)
        decode.decode(queries, protected(batch), dim**-0.5, backend="metal", splits=splits)
        yield from recorded(n_rows, how)
    new = mx.zeros((1, N_KV_HEADS, N_TOKENS, dim), mx.float16)
    pack.pack(new, new, layout, centre=centre, backend="metal")
    dequantize.rotated_rows(view(1), mx.float16, 0, N_KV_HEADS, "metal")
    fresh = protected(1)._replace(fresh=(new, new))
    segment_rows(fresh, mx.float16, (0, N_KV_HEADS), "metal")
    yield from recorded()
