"""The kernel benchmark: what it compares, and that a wrong result is found."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import mlx_turbokv  # noqa: F401, I001: before mlx.core
import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_kernels as bench  # noqa: E402
import kernel_variants as variants  # noqa: E402
from mlx_turbokv.kernels.backend import REFERENCE  # noqa: E402

CUDA = REFERENCE._replace(name="cuda")  # nothing is run on it here


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(variants, "ROTATED_BYTES", 1)
    monkeypatch.setattr(bench, "CHAIN_SECONDS", 1e-6)


def names(part: str, lengths=bench.LENGTHS) -> list[tuple]:
    parts = [part, "rows"]
    found = bench.groups(parts, bench.PAIRS, lengths, CUDA)
    return [(g.heads, g.head_dim, g.tokens, name) for g in found for name in g.make]


def test_every_length_pair_and_shape_is_compared_with_fp16() -> None:
    at = (bench.HEADS, 128)
    for n, pair in product((2048, 8192, 32768, 131072), ("q8_0/turbo2", "turbo4/turbo3")):
        assert (*at, n, pair) in names("lengths") and (*at, n, f"{pair} rows") in names("lengths")
    for k, v in product(("q8_0", "turbo6", "turbo4", "turbo3"), ("turbo4", "turbo3", "turbo2")):
        assert (*at, 131072, f"{k}/{v}") in names("pairs")
    for shape in (((28, 4), 128), ((40, 10), 128), ((9, 3), 64), ((16, 8), 256)):
        for name in ("fp16", "q8_0/turbo2", "turbo4/turbo3"):
            assert (*shape, 131072, name) in names("shapes")
    assert (*at, 32768, "turbo4/turbo3 centred") in names("centred")
    assert {n for *_, n in names("kv_bits")} >= {"fp16", "kv_bits8", "kv_bits4"}


def test_rows_say_what_was_read_and_how_wrong_it_was() -> None:
    (group,) = bench.groups(["lengths"], ["turbo4/turbo3"], [64], REFERENCE)
    fp16, packed = bench.bench(group, 1, True, 1e9)
    assert fp16["fp16_over_this"] == 1 and fp16["bytes"] == 64 * 8 * 128 * 4
    assert packed["bytes"] == 64 * 8 * 116  # 4.125 and 3.125 bits a value
    assert packed["us"] > 0 and packed["apart_us"] > 0
    assert 0 < packed["error"] <= packed["error_allowed"]


@pytest.mark.parametrize("make", [variants.packed_attention, variants.pack_chunk, variants.pack_token])
def test_a_result_that_is_a_percent_off_is_found(make) -> None:
    def off(x, *rest, **options):
        return REFERENCE.pack(x * mx.array(1.01, x.dtype), *rest, **options)

    broken = REFERENCE._replace(pack=off)
    if make is variants.packed_attention:
        broken = REFERENCE._replace(attention=lambda *args: REFERENCE.attention(*args) * 1.01)
    inputs = variants.noise((4, 2), 128, 1 if make is variants.pack_token else 32)
    for backend, good in ((REFERENCE, True), (broken, False)):
        error, allowed = make("turbo4/turbo3", inputs, backend).check()
        assert (error <= allowed) is good
