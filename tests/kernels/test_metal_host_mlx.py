"""MLX's own kernels, from the installed wheel, on the host layer against mx.fast."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from metal_host import HostMetal
from metal_host.build import compile_kernel
from metal_host.executor import to_numpy
from metal_host.text import set_function_constants
from metal_host.toolchain import mlx_include
from metal_host.worker import Buffer

KERNELS = mlx_include() / "mlx" / "backend" / "metal" / "kernels"
SDPA_CONSTANTS = (
    "has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks",
)  # fmt: skip
# Both sides accumulate in float32, in another order.
FLOAT32_TOLERANCE = 2e-6
HALF_TOLERANCE = 2e-3  # one rounding to half of outputs of about 1


def sdpa_text(blocks: int = 32, **on: bool) -> str:
    text = (KERNELS / "sdpa_vector.h").read_text()
    values: dict[str, object] = {name: on.get(name, False) for name in SDPA_CONSTANTS}
    return set_function_constants(text, {**values, "blocks": blocks})


def run(host: HostMetal, text: str, name: str, call: str, grid, threadgroup, values: dict):
    """Runs a kernel with `values`: arrays by parameter name, an output as a dtype and shape."""
    compiled = compile_kernel(text, name, call)
    buffers = []
    for p in compiled.kernel.parameters:
        if p.buffer is None:
            continue
        value = values.get(p.name, np.zeros(1, np.int64))
        if isinstance(value, tuple):
            buffers.append(Buffer(p.name, np.zeros(value[1], value[0]), 1))
        else:
            buffers.append(Buffer(p.name, np.ascontiguousarray(value), 0))
    return host.run_buffers(compiled, grid, threadgroup, buffers)


def sdpa_inputs(dtype: mx.Dtype, heads: int, kv_heads: int, n: int, dim: int, n_queries: int = 1):
    rng = np.random.default_rng(heads * 1000 + n + dim)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)

    keys, values = (normal(1, kv_heads, n, dim) for _ in range(2))
    return normal(1, heads, n_queries, dim), keys, values


def strides(n: int, dim: int) -> dict:
    return {
        "k_head_stride": np.uint64(n * dim),
        "k_seq_stride": np.uint64(dim),
        "v_head_stride": np.uint64(n * dim),
        "v_seq_stride": np.uint64(dim),
        "scale": np.float32(1 / math.sqrt(dim)),
        "N": np.int32(n),
    }


def expected(q, k, v, **kwargs) -> np.ndarray:
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    return np.array(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, **kwargs))


@pytest.mark.parametrize(
    ("dtype", "name", "dim", "n", "causal"),
    [
        (mx.float32, "float", 64, 45, False),
        (mx.float16, "half", 128, 33, False),
        (mx.float32, "float", 64, 37, True),
    ],
)
def test_sdpa_vector_agrees_with_mx_fast(metal_host, dtype, name, dim, n, causal) -> None:
    n_queries = 3 if causal else 1
    q, k, v = sdpa_inputs(dtype, 4, 2, n, dim, n_queries)
    (out,) = run(
        metal_host, sdpa_text(do_causal=causal), "sdpa_vector",
        f"sdpa_vector<{name}, {dim}, {dim}>",
        (4 * 1024, n_queries, 1), (1024, 1, 1),
        {
            "queries": to_numpy(q), "keys": to_numpy(k), "values": to_numpy(v),
            "gqa_factor": np.int32(2), **strides(n, dim),
            "out": (to_numpy(q).dtype, (1, 4, n_queries, dim)),
        },
    )  # fmt: skip
    want = expected(q, k, v, mask="causal" if causal else None)
    tolerance = FLOAT32_TOLERANCE if dtype == mx.float32 else HALF_TOLERANCE
    np.testing.assert_allclose(out.astype(np.float32), want, rtol=0, atol=tolerance)


def test_sdpa_vector_two_passes_agree_with_mx_fast(metal_host) -> None:
    heads, kv_heads, n, dim, blocks = 4, 2, 70, 64, 32
    q, k, v = sdpa_inputs(mx.float32, heads, kv_heads, n, dim)
    partial, sums, maxs = run(
        metal_host, sdpa_text(blocks), "sdpa_vector_2pass_1", f"sdpa_vector_2pass_1<float, {dim}>",
        (32 * kv_heads, heads // kv_heads, blocks), (32, heads // kv_heads, 1),
        {
            "queries": to_numpy(q), "keys": to_numpy(k), "values": to_numpy(v), **strides(n, dim),
            "out": (np.float32, (heads, blocks, dim)), "sums": (np.float32, (heads, blocks)),
            "maxs": (np.float32, (heads, blocks)),
        },
    )  # fmt: skip
    (out,) = run(
        metal_host, sdpa_text(blocks), "sdpa_vector_2pass_2", f"sdpa_vector_2pass_2<float, {dim}>",
        (heads * 1024, 1, 1), (1024, 1, 1),
        {
            "partials": partial, "sums": sums, "maxs": maxs, "blocks": np.int32(blocks),
            "out": (np.float32, (1, heads, 1, dim)),
        },
    )  # fmt: skip
    np.testing.assert_allclose(out, expected(q, k, v), rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("n", "radix"), [(128, 16), (256, 16), (512, 16)])
def test_hadamard_n_agrees_with_mx(metal_host, n, radix) -> None:
    rows = 3
    x = np.random.default_rng(n).normal(size=(rows, n)).astype(np.float32)
    scale = 1 / math.sqrt(n)
    (out,) = run(
        metal_host, (KERNELS / "hadamard.h").read_text(), "hadamard_n",
        f"hadamard_n<float, {n}, {radix}, 4, 1>", (n // radix, rows, 1), (n // radix, 1, 1),
        {"in": x, "out": (np.float32, (rows, n)), "scale": np.float32(scale)},
    )  # fmt: skip
    want = np.array(mx.hadamard_transform(mx.array(x), scale=scale))
    np.testing.assert_allclose(out, want, rtol=0, atol=FLOAT32_TOLERANCE)
