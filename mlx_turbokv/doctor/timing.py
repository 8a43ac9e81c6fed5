"""Times of the jobs of a variant, and of MLX's fp16 attention on the same shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from itertools import cycle

import mlx.core as mx

from ..attention.dispatch import attention
from ..centring.centre import Centre
from ..centring.rope import RopeFrequencies
from ..kernels.backend import Backend
from ..kernels.packed import PackedKV, empty_tiles
from .variants import Variant

# tokens, KV heads, query heads
GPU_SHAPE = (8192, 8, 32)
CPU_SHAPE = (512, 2, 8)
# copies of what is read are used in turn, so that no cache holds them all
ROTATED_BYTES = 128 * 2**20


def shape_for(backend: str) -> tuple[int, int, int]:
    """Tokens, KV heads and query heads that a back-end is timed on."""
    return CPU_SHAPE if backend == "reference" else GPU_SHAPE


def time_variant(variant: Variant, backend: Backend) -> dict:
    """Median microseconds and GB/s of pack, decode (one query) and dequantize (to fp16).

    GB/s count what each must read and write; ``decode_speedup`` is the time of MLX's fp16
    attention over that of decode.
    """
    n, n_kv_heads, n_heads = shape_for(backend.name)
    layout = variant.layout
    dims = variant.k_head_dim, variant.v_head_dim
    dtype = getattr(mx, variant.dtype)
    calls, rounds = (1, 3) if backend.name == "reference" else (8, 5)
    keys, values = (noise((1, n_kv_heads, n, dim), dtype) for dim in dims)
    queries = noise((1, n_heads, 1, dims[0]), dtype)
    options = {}
    if variant.centred:
        rope = RopeFrequencies.from_arguments(dims[0], dims[0], False, 1e4)
        mu = noise((n_kv_heads, dims[0]), mx.float32)
        options = {"centre": Centre(mu, rope, "noise")}
    tiles = backend.pack(keys, values, layout, **options)
    mx.eval(tiles)
    packed = PackedKV(layout, tiles, n, empty_tiles(), 0, options.get("centre"))
    turns = cycle([packed._replace(body=body) for (body,) in copies(calls, tiles)])
    scale = dims[0] ** -0.5
    pack = timed(lambda: backend.pack(keys, values, layout, **options), calls, rounds)
    decode = timed(lambda: attention(queries, next(turns), scale, backend=backend), calls, rounds)
    rows = timed(lambda: backend.dequantize(next(turns), mx.float16), calls, rounds)
    fp16 = _fp16_attention(dims, (n, n_kv_heads, n_heads), calls, rounds)
    row_bytes = n_kv_heads * n * sum(dims) * 2
    read = keys.nbytes + values.nbytes
    return {
        "shape": [n, n_kv_heads, n_heads],
        "packed_bytes": tiles.nbytes,
        "pack_us": round(pack * 1e6, 1),
        "pack_gb_s": round((read + tiles.nbytes) / pack / 1e9, 2),
        "decode_us": round(decode * 1e6, 1),
        "decode_gb_s": round(tiles.nbytes / decode / 1e9, 2),
        "dequantize_us": round(rows * 1e6, 1),
        "dequantize_gb_s": round((tiles.nbytes + row_bytes) / rows / 1e9, 2),
        "fp16_us": round(fp16 * 1e6, 1),
        "fp16_gb_s": round(row_bytes / fp16 / 1e9, 2),
        "decode_speedup": round(fp16 / decode, 2),
    }


def timed(call: Callable[[], object], calls: int = 8, rounds: int = 5) -> float:
    """Median seconds of one call, of several rounds of calls that are evaluated together."""
    mx.eval(call())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval([call() for _ in range(calls)])
        seconds.append((time.perf_counter() - start) / calls)
    return sorted(seconds)[rounds // 2]


@cache
def _fp16_attention(
    dims: tuple[int, int], shape: tuple[int, int, int], calls: int, rounds: int
) -> float:
    n, n_kv_heads, n_heads = shape
    keys, values = (noise((1, n_kv_heads, n, dim), mx.float16) for dim in dims)
    queries = noise((1, n_heads, 1, dims[0]), mx.float16)
    scale = dims[0] ** -0.5
    turns = cycle(copies(calls, keys, values))
    attention = mx.fast.scaled_dot_product_attention
    return timed(lambda: attention(queries, *next(turns), scale=scale), calls, rounds)


def copies(most: int, *arrays: mx.array) -> list[list[mx.array]]:
    """As many copies of the arrays as fit in ROTATED_BYTES, at least one."""
    n_bytes = sum(array.nbytes for array in arrays)
    n = max(1, min(most, ROTATED_BYTES // n_bytes))
    sets = [[array + mx.array(0, array.dtype) for array in arrays] for _ in range(n)]
    mx.eval(sets)
    return sets


def noise(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    array = mx.random.normal(shape, key=mx.random.key(shape[-1])).astype(dtype)
    mx.eval(array)
    return array
