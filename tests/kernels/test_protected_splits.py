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
        (131072, 4, (4, 3, 16)),  # eight KV heads on a GPU of eight cores
        (131072, 33, (33, 32, 16)),  # and of 66
        (32768, 33, (32, 32, 0)),  # the others would have 32 tiles in either case
        (32768, 2, (2, 1, 16)),
        (8192, 4, (4, 3, 16)),
        (8192, 33, (32, 32, 0)),  # 31 splits would have 9 tiles: one SIMD group of a scheduler more
        (1024, 4, (2, 2, 0)),
        (192, 2, (0, 0, 0)),
    ],
)
def test_a_split_reads_both_only_where_that_is_sooner(n_tokens, splits, expected) -> None:
    assert of_tokens(n_tokens).shared_out(n_tokens, splits, APPLE.simd_groups, STEPS) == expected


def rounds(tiles: int, splits: int, step: int) -> int:
    """Tiles of the slowest SIMD group of each scheduler where so many splits share these."""
    return -(-tiles // (splits * SIMDS_AT_ONCE * step)) * step


@given(
    n_tokens=st.integers(320, 400_000),
    splits=st.integers(2, 66),
    sink=st.sampled_from((0, 32, 256)),
    n_tail=st.integers(128, 256),
    simd_groups=st.sampled_from((4, 8)),
    steps=st.sampled_from(((2, 1), (2, 2), (1, 1))),
)
def test_splits_share_all_rows_and_none_is_late(
    n_tokens, splits, sink, n_tail, simd_groups, steps
) -> None:
    found = of_tokens(n_tokens, n_tail, sink)
    shares = found.shared_out(n_tokens, splits, simd_groups, steps)
    body, first, spared = shares
    assert 0 < body <= splits and first < splits and first in (body, body - 1)
    work = works(n_tokens, found, splits, shares)
    assert min(work) > 0
    n_body = found.tail_start // TILE
    n_own = found.first_tiles + -(-n_tokens // TILE) - n_body
    stride = simd_groups * steps[0]
    needed = -(-PROTECTED_COST * n_own // stride) * stride  # of the body, in whole steps
    together = rounds(n_body + needed, splits, steps[0])

    def apart(n: int) -> int:
        own = PROTECTED_COST * rounds(n_own, splits - n, steps[1])
        return max(rounds(n_body, n, steps[0]), own)

    soonest = min(apart(n) for n in range(1, splits))
    assert (spared > 0) == (first < body)
    if spared:
        assert spared == needed and together <= soonest
        assert max(work) == work[0] and -(-(n_body + spared) // splits) < n_body / (splits - 1)
    else:
        assert apart(body) == soonest
        assert together >= soonest or (n_body + needed) // splits <= needed


def test_an_h200_gives_protected_rows_splits_of_their_own_unless_others_grow_longer() -> None:
    groups = tuning.CUDA.simd_groups
    assert of_tokens(32768).shared_out(32768, 33, groups, STEPS) == (32, 32, 0)
    # 125 tiles, of which 128 would be left to 32 splits
    assert of_tokens(131072).shared_out(131072, 33, groups, STEPS) == (33, 32, 16)


def test_first_tokens_alone_leave_the_body_its_splits() -> None:
    found = of_tokens(32768, newest=False)
    assert found.shared_out(32768, 4, APPLE.simd_groups, STEPS) == (4, 3, 8)


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
