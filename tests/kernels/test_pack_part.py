"""A part of new rows is packed as its slice is, and read in place."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.kernels import assemble, pack, reference
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import TILE, KVLayout

DIM, HEADS, BATCH = 64, 2, 2
LAYOUT = KVLayout(KVFormat.parse("turbo3"), KVFormat.parse("q8_0"), DIM, DIM, "float16")
EXAMPLES = 40  # of each test: one runs three kernels on the CPU


def noise(seed: int, *shape: int) -> mx.array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return mx.array(values).astype(mx.float16)


CENTRE = Centre(
    noise(0, HEADS, DIM).astype(mx.float32),
    RopeFrequencies.from_arguments(DIM, DIM, False, 1e4), "test",
)  # fmt: skip


class Part(NamedTuple):
    n_new: int
    n_kept: int
    start: int
    stop: int


@st.composite
def parts(draw) -> Part:
    """To the last row or the end of a tile; from the first row if others are kept."""
    n_new, n_kept = draw(st.integers(1, 100)), draw(st.sampled_from([0, 0, 5, 32, 40]))
    start = 0 if n_kept else draw(st.integers(0, n_new - 1))
    ends = [n for n in range(start + 1, n_new) if (n_kept + n - start) % TILE == 0]
    return Part(n_new, n_kept, start, draw(st.sampled_from([*ends, n_new])))


def of_both(packed_by, part: Part, centred: bool) -> list[np.ndarray]:
    """The tiles of a part, and of its slice."""
    keys, values = (noise(seed, BATCH, HEADS, part.n_new, DIM) for seed in (1, 2))
    first, own = 7, {}
    if centred:
        own = {"centre": CENTRE, "left_padding": mx.array([0, 3], mx.int32)}
    kept = (noise(seed, BATCH, HEADS, 40, DIM) for seed in (3, 4))
    tail = reference.pack(*kept, LAYOUT)
    found = []
    for at, rows, given_part in (
        (first, slice(None), (part.start, part.stop)),
        (first + part.start, slice(part.start, part.stop), None),
    ):
        new = keys[:, :, rows], values[:, :, rows]
        at_row = {**own, "first": at} if centred else {}
        tiles = packed_by(*new, LAYOUT, tail, part.n_kept, part=given_part, **at_row)
        found.append(np.array(tiles))
    return found


@settings(max_examples=EXAMPLES, deadline=None)
@given(part=parts(), centred=st.booleans())
def test_the_reference_packs_a_part_as_its_slice(part: Part, centred: bool) -> None:
    np.testing.assert_array_equal(*of_both(reference.pack, part, centred))


@pytest.mark.slow
def test_the_kernel_packs_a_part_as_its_slice(metal_host, monkeypatch) -> None:
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(part=parts(), centred=st.booleans())
    def check(part: Part, centred: bool) -> None:
        np.testing.assert_array_equal(*of_both(pack.pack, part, centred))

    check()
