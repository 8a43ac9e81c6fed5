"""How decode's splits are shared out between the body and protected rows."""

from __future__ import annotations

import heapq
from dataclasses import replace

import pytest
from apple_variants import variants
from hypothesis import given
from hypothesis import strategies as st
from metal_host.opencl import constants
from segment_cases import SegmentCase, run_segment_case

from mlx_turbokv.kernels import assemble, tuning
from mlx_turbokv.kernels.decode_launch import PROTECTED_COST, Segments
from mlx_turbokv.quant.layout import TILE


def of_tokens(n: int, n_tail: int = 192, sink: int = 32, newest: bool = True) -> Segments:
    """A sequence of ``n`` tokens with so many in its tail."""
    start = max(0, n - n_tail) // TILE * TILE
    return Segments(n, sink // TILE, sink // TILE, start, (start,), newest)


def makespan(n_tokens: int, found: Segments, total: int, body: int, slots: int) -> float:
    """When a head's splits are done if they start in order, ``slots`` at once."""
    tail_tiles = -(-n_tokens // TILE) - found.tail_start // TILE
    protected = PROTECTED_COST * (found.first_tiles + tail_tiles)
    works = [found.tail_start / TILE / body] * body if body else []
    works += [protected / (total - body)] * (total - body)
    ends = [0.0] * slots
    for work in works:
        heapq.heapreplace(ends, ends[0] + work)
    return max(ends)


@pytest.mark.parametrize(
    ("n_tokens", "splits", "expected"),
    [
        (131072, 4, (5, 4)),  # eight KV heads on a GPU of eight cores
        (131072, 33, (33, 32)),  # and of 132
        (32768, 2, (3, 2)),
        (8192, 4, (5, 4)),
        (1024, 4, (4, 3)),
        (192, 2, (2, 0)),
    ],
)
def test_the_body_gives_up_a_split_only_where_that_is_sooner(n_tokens, splits, expected) -> None:
    assert of_tokens(n_tokens).shared_out(n_tokens, splits, one_more=True) == expected


@given(
    n_tokens=st.integers(320, 400_000),
    splits=st.integers(2, 66),
    sink=st.sampled_from((0, 32, 256)),
    n_tail=st.integers(128, 256),
)
def test_one_split_less_for_the_body_is_never_sooner(n_tokens, splits, sink, n_tail) -> None:
    found = of_tokens(n_tokens, n_tail, sink)
    total, body = found.shared_out(n_tokens, splits, one_more=True)
    assert total in (splits, splits + 1) and 0 < body < total
    took = makespan(n_tokens, found, total, body, splits)
    if body >= splits - 1 and splits > 2:
        assert took <= makespan(n_tokens, found, splits, splits - 1, splits) * (1 + 1e-9)
    if total > splits:
        assert body == splits
    assert found.shared_out(n_tokens, splits, one_more=False)[0] == splits


def test_first_tokens_alone_leave_the_body_its_splits() -> None:
    found = of_tokens(32768, newest=False)
    assert found.shared_out(32768, 4, one_more=True) == (5, 4)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_apples_gpus_take_a_tile_at_a_time_of_protected_rows_after_the_body(rows: int) -> None:
    for dim in (64, 80, 96, 128, 256):
        wide = dim > tuning.NARROW
        assert tuning.APPLE.tiles_at_once(rows, dim, False) == 2
        assert tuning.APPLE.tiles_at_once(rows, dim, False, after_body=True) == (1 if wide else 2)
        assert tuning.CUDA.tiles_at_once(rows, dim, False, after_body=True) == 2
        one = replace(tuning.CUDA, step=1)  # as doctor --tune may cut it
        assert one.tiles_at_once(rows, dim, False, after_body=True) == 1


@pytest.mark.parametrize(
    ("how", "dim", "parts", "steps"),
    [
        ("protected-whole", 128, 1, [2, 1]),
        ("protected-whole", 64, 2, [2, 2]),  # halves of a SIMD group take a tile each
        ("protected", 128, 1, [2, 2]),
    ],
)
def test_tiles_at_once_are_those_of_the_text(how, dim, parts, steps) -> None:
    found = variants(["turbo4/turbo3"], (dim,), (4,))
    launch = next(v.launch for v in found if v.how == how)
    assert launch.grid[2] == 1 and (launch.grid[1] == 1) == (how == "protected-whole")
    names = "Body::PARTS", "Protected::PARTS", "Body::STEP", "Protected::STEP"
    assert constants(launch.text, launch.name, names) == [parts, parts, *steps]


@pytest.mark.slow
def test_one_split_more_agrees_with_float64(metal_host, monkeypatch) -> None:
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    monkeypatch.setattr(tuning.Tuning, "n_splits", lambda *_: 2)
    case = SegmentCase(
        ("turbo4", "turbo3"), 64, "float16", (1, 2, 4), 2, "a long body", splits=None
    )
    n_before = len(metal_host.launches)
    assert run_segment_case(case, "metal")["failures"] == []
    assert [launch.grid[1] for launch in metal_host.launches[n_before:]][0] == 3
