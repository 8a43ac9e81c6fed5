"""Formats: names, sizes, and refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turbokv import InputError, KVFormat
from mlx_turbokv.quant.formats import FORMAT_NAMES, check_head_dim
from mlx_turbokv.quant.layout import KVLayout

NAMES = (*FORMAT_NAMES, *(f"turbo{bits}:32" for bits in range(2, 7)))
HEAD_DIMS = (64, 72, 80, 96, 112, 128, 160, 192, 256, 512)


@pytest.mark.parametrize("name", NAMES)
def test_name_round_trip(name):
    assert str(KVFormat.parse(name)) == name
    assert KVFormat.parse(f" {name.upper()} ") == KVFormat.parse(name)


@pytest.mark.parametrize(
    "name", ["", "turbo1", "turbo7", "turbo3:64", "turbo8:32", "q4_0", "turbo", "bf16"]
)
def test_unknown_name_is_named(name):
    with pytest.raises(InputError, match="accepted are f16, q8_0, turbo2"):
        KVFormat.parse(name)


@pytest.mark.parametrize(
    ("name", "head_dim", "bits"),
    [
        ("f16", 128, 16), ("q8_0", 128, 8.5), ("q8_0", 64, 8.5),
        ("turbo2", 128, 2.125), ("turbo2", 64, 2.25), ("turbo2:32", 128, 2.5),
        ("turbo8", 128, 8.5), ("turbo8", 80, 8.6),
        ("turbo3", 128, 3.125), ("turbo3:32", 128, 3.5), ("turbo4", 128, 4.125),
        ("turbo5", 256, 5.125), ("turbo6", 80, 6.2), ("turbo2", 512, 2.125),
    ],
)  # fmt: skip
def test_bits_per_value(name, head_dim, bits):
    assert KVFormat.parse(name).bits_per_value(head_dim) == bits


@given(st.sampled_from(NAMES), st.sampled_from(NAMES), st.sampled_from(HEAD_DIMS))
def test_layout_is_exactly_its_rows(k, v, head_dim):
    """No padding: a tile is 32 rows, and its regions are its rows' codes and scales."""
    k, v = KVFormat.parse(k), KVFormat.parse(v)
    layout = KVLayout(k, v, head_dim, head_dim)
    bits = 32 * head_dim * (k.bits_per_value(head_dim) + v.bits_per_value(head_dim))
    assert 32 * layout.tile_words == pytest.approx(bits, rel=1e-12)
    assert list(layout.offsets) == sorted(layout.offsets)
    assert all(offset % 32 == 0 for offset in layout.offsets)
    assert sum(layout.k_columns) == k.code_bytes(head_dim)


@pytest.mark.parametrize("head_dim", [100, 104, 7])
def test_head_dim_that_cannot_be_rotated_is_named(head_dim):
    with pytest.raises(InputError, match=f"head_dim {head_dim} cannot be rotated"):
        check_head_dim(KVFormat.parse("turbo3"), head_dim)


def test_q8_0_takes_any_multiple_of_eight():
    check_head_dim(KVFormat.parse("q8_0"), 104)
    with pytest.raises(InputError, match="head_dim 100 cannot be packed"):
        check_head_dim(KVFormat.parse("q8_0"), 100)
