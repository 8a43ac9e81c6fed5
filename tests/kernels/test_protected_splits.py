"""How decode's splits are shared out between the body and protected rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from apple_variants import variants
from hypothesis import given
from hypothesis import strategies as st
from metal_host.opencl import constants
from segment_cases import SegmentCase, run_segment_case

from mlx_turbokv.kernels import assemble, tuning
from mlx_turbokv.kernels.splits import PROTECTED_COST, SIMDS_AT_ONCE, Segments, Shares
from mlx_turbokv.kernels.tuning import APPLE
from mlx_turbokv.quant.layout import TILE

STEPS = (2, 1)  # tiles at a time of both tunings


def of_tokens(n: int, n_tail: int = 192, sink: int = 32, newest: bool = True) -> Segments:
    """A sequence of ``n`` tokens with so many in its tail."""
    start = max(0, n - n_tail) // TILE * TILE
    return Segments(n, sink // TILE, sink // TILE, start, (start,), newest)


def works(n_tokens: int, found: Segments, splits: int, shares: Shares) -> list[float]:
    """What each split reads, in tiles of the body."""
    tail_tiles = -(-n_tokens // TILE) - found.tail_start // TILE
    protected = PROTECTED_COST * (found.first_tiles + tail_tiles)
    body, first, spared = shares
    work = [0.0] * splits
    for i in range(body):
        work[i] += (found.tail_start / TILE + spared) / body - spared * (i == body - 1)
    for i in range(first, splits):
        work[i] += protected / (splits - first)
    return work


@pytest.mark.parametrize(
    ("n_tokens", "splits", "expected"),
    [
        (131072, 4, (4, 3, 14)),  # eight KV heads on a GPU of eight cores
        (131072, 33, (33, 32, 14)),  # and of 66
        (32768, 33, (32, 32, 0)),  # the second loop's start would cost more than it saves
        (32768, 2, (2, 1, 14)),
        (8192, 4, (4, 3, 14)),
        (8192, 33, (32, 32, 0)),  # 31 splits would have 9 tiles: one SIMD group of a scheduler more
        (1024, 4, (2, 2, 0)),
        (192, 2, (0, 0, 0)),
    ],
)
def test_a_split_reads_both_only_where_that_is_sooner(n_tokens, splits, expected) -> None:
    assert of_tokens(n_tokens).shared_out(n_tokens, splits, APPLE.mixed_gain, STEPS) == expected


def rounds(n_tokens: int, found: Segments, body: int, own: int, steps: tuple[int, int]) -> int:
    """What the slowest split takes if ``body`` read the body and ``own`` protected rows."""
    n_body = found.tail_start // TILE
    n_own = found.first_tiles + -(-n_tokens // TILE) - n_body
    times = []
    for tiles, splits, step, cost in ((n_body, body, steps[0], 1), (n_own, own, steps[1], 2)):
        longest = -(-tiles // splits)
        turns = -(-longest // (SIMDS_AT_ONCE * step))
        times.append(turns * step * cost)
    return max(times)


@given(
    n_tokens=st.integers(320, 400_000),
    splits=st.integers(2, 66),
    sink=st.sampled_from((0, 32, 256)),
    n_tail=st.integers(128, 256),
    gain=st.sampled_from((1.02, 1.15)),
    steps=st.sampled_from(((2, 1), (2, 2), (1, 1))),
)
def test_splits_share_all_rows_and_none_is_late(
    n_tokens, splits, sink, n_tail, gain, steps
) -> None:
    found = of_tokens(n_tokens, n_tail, sink)
    shares = found.shared_out(n_tokens, splits, gain, steps)
    body, first, spared = shares
    assert 0 < body <= splits and first < splits and first in (body, body - 1)
    work = works(n_tokens, found, splits, shares)
    assert min(work) > 0
    assert (spared > 0) == (first < body)
    even = sum(work) / splits
    if spared:
        assert max(work) == pytest.approx(even)
        return
    assert max(work) <= gain * even + 1e-9 or even <= sum(work[first:]) + 1e-9
    least = min(rounds(n_tokens, found, n, splits - n, steps) for n in range(1, splits))
    assert rounds(n_tokens, found, body, splits - body, steps) == least


def test_an_h200_gives_protected_rows_splits_of_their_own_where_it_has_many() -> None:
    found, gain = of_tokens(131072), tuning.CUDA.mixed_gain
    assert found.shared_out(131072, 33, gain, STEPS) == (32, 32, 0)
    assert found.shared_out(131072, 2, gain, STEPS) == (2, 1, 14)  # many sequences


def test_first_tokens_alone_leave_the_body_its_splits() -> None:
    found = of_tokens(32768, newest=False)
    assert found.shared_out(32768, 4, APPLE.mixed_gain, STEPS) == (4, 3, 2)


@pytest.mark.parametrize("cut", [tuning.APPLE, tuning.CUDA])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_tile_at_a_time_of_protected_rows(rows: int, cut: tuning.Tuning) -> None:
    assert (cut.step, cut.protected_step) == STEPS
    for dim in (64, 80, 96, 128, 256):
        wide = dim > tuning.NARROW
        assert cut.tiles_at_once(rows, dim, False) == 2
        assert cut.tiles_at_once(rows, dim, False, protected=True) == (1 if wide else 2)
        one = replace(cut, step=1)  # as doctor --tune may cut it
        assert one.tiles_at_once(rows, dim, False, protected=True) == 1


@pytest.mark.parametrize(
    ("how", "dim", "parts", "steps"),
    [
        ("protected-whole", 128, 1, [2, 1]),
        ("protected-whole", 64, 2, [2, 2]),  # halves of a SIMD group take a tile each
        ("protected", 128, 1, [2, 1]),
    ],
)
def test_tiles_at_once_are_those_of_the_text(how, dim, parts, steps) -> None:
    found = variants(["turbo4/turbo3"], (dim,), (4,))
    launch = next(v.launch for v in found if v.how == how)
    assert launch.grid[2] == 1 and (launch.grid[1] == 1) == (how == "protected-whole")
    names = "Body::PARTS", "Protected::PARTS", "Body::STEP", "Protected::STEP"
    assert constants(launch.text, launch.name, names) == [parts, parts, *steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", ["a long body", "first tokens alone, long", "bodies of two lengths"]
)
@pytest.mark.parametrize("n_queries", [1, 8])
def test_a_split_that_reads_both_agrees_with_float64(
    metal_host, monkeypatch, shape: str, n_queries: int
) -> None:
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    case = SegmentCase(
        ("turbo4", "turbo3"), 64, "float16", (2, 1, 3), n_queries, shape, centred=True, splits=3
    )
    found, shared_out = [], Segments.shared_out

    def noted(*arguments) -> Shares:
        found.append(shared_out(*arguments))
        return found[-1]

    monkeypatch.setattr(Segments, "shared_out", noted)
    assert run_segment_case(case, "metal")["failures"] == []
    assert found and all(shares.protected_split == shares.body_splits - 1 for shares in found)
