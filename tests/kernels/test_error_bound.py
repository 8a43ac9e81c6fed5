"""The bound that kernels' errors are held against: right outputs are within it, wrong ones not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_turbokv.doctor import error_bound
from mlx_turbokv.kernels import reference
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout

SCALE, N = 0.125, 300


def _case(pair: tuple[str, str], dtype: str) -> tuple[mx.array, PackedKV]:
    def rows(n: int, seed: int) -> mx.array:
        return mx.random.normal((1, 2, n, 64), key=mx.random.key(seed)).astype(getattr(mx, dtype))

    layout = KVLayout(KVFormat.parse(pair[0]), KVFormat.parse(pair[1]), 64, 64, dtype)
    tiles = reference.pack(rows(N, 1), rows(N, 2), layout)
    return rows(4, 3), PackedKV(layout, empty_tiles(), 0, tiles, N)


def _bound(queries: mx.array, packed: PackedKV, sinks=None) -> error_bound.Result:
    seen = np.ones((1, 1, queries.shape[2], N), bool)
    return error_bound.attention(queries, packed, SCALE, seen, sinks)


@pytest.mark.parametrize("sinks", [None, mx.array([0.5, 3.0])])
@pytest.mark.parametrize("pair", [("turbo4", "turbo3"), ("q8_0", "turbo2:32"), ("f16", "q8_0")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_reference_is_within_the_bound_and_one_percent_is_not(dtype, pair, sinks) -> None:
    queries, packed = _case(pair, dtype)
    truth = _bound(queries, packed, sinks)
    exact = reference.attention(queries.astype(mx.float32), packed, SCALE, sinks=sinks)
    output = exact.astype(queries.dtype)
    assert truth.ratio(output) < 1
    assert np.abs(np.array(exact) - truth.output).max() < 1e-5
    if dtype != "bfloat16":
        assert truth.ratio((exact * 1.01).astype(queries.dtype)) > 1
    assert truth.ratio(mx.where(mx.arange(64) == 5, mx.nan, output)) == np.inf


def test_truncated_outputs_are_beyond_the_bound() -> None:
    queries, packed = _case(("f16", "q8_0"), "bfloat16")
    truth = _bound(queries, packed)
    exact = reference.attention(queries.astype(mx.float32), packed, SCALE)
    truncated = (exact.view(mx.uint32) & 0xFFFF0000).view(mx.float32).astype(mx.bfloat16)
    assert truth.ratio(exact.astype(mx.bfloat16)) < 1 < truth.ratio(truncated)


@pytest.mark.parametrize("token", [0, 31, 150, N - 1])
def test_a_token_too_few_is_beyond_the_bound(token: int) -> None:
    queries, packed = _case(("turbo4", "turbo3"), "float16")
    seen = mx.arange(N) != token
    missing = reference.attention(queries.astype(mx.float32), packed, SCALE, seen[None])
    assert _bound(queries, packed).ratio(missing.astype(mx.float16)) > 1
