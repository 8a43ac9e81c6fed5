"""What bench_kernels.py times: attention, packing and reading back, over rotating buffers.

A variant is called with the number of the call and what the last call gave, so that calls follow
one another as the layers of a model do. Each reads other buffers than the last, so that nothing is
found in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_turbokv.attention import dispatch
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.kernels import dequantize, reference
from mlx_turbokv.kernels.backend import Backend
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout

ROTATED_BYTES = 120 * 2**20  # more than twice the largest cache of a card
MOST_COPIES = 32
THETA = 1e6
N_KEPT = 16  # rows of a tail that one token is appended to
# decode's relative error against float64 over the same rows: within twice that of an fp16
# attention, or what chains of half products cost where noise leaves only the mean of its values
ERROR_RATIO, ERROR_FLOOR = 2.0, 1.25e-3
# packed rows, and rows read back to half, against the reference's
PACK_ERROR, ROWS_ERROR = 1e-3, 1e-3
KV_BITS_ERROR = 1e-2


class Inputs(NamedTuple):
    """Rows of one shape, and queries.

    Shapes:
        keys, values: [B, n_kv_heads, n, head_dim]; queries: [B, n_heads, L, head_dim]; float16.
    """

    keys: mx.array
    values: mx.array
    queries: mx.array


@dataclass
class Variant:
    """A call to time.

    Args:
        call: number of the call and last result to the next result.
        start: what the first call gets for a last result, made anew each time.
        n_bytes: what one call must read and write in device memory.
        check: the call's relative error, and what is accepted; None where nothing is compared.
        chained: whether a call needs the last one's result.
        in_place: whether it writes into the result that it gets, so that no earlier one is left
            to be waited for: each step of a chain then has a start of its own.
    """

    call: Callable
    start: Callable
    n_bytes: int
    check: Callable[[], tuple[float, float]] | None = None
    chained: bool = True
    in_place: bool = False


def noise(heads: tuple[int, int], dim: int, n: int, batch: int = 1, n_queries: int = 1) -> Inputs:
    """Normal noise, the same every time."""
    mx.random.seed(0)
    shapes = (heads[1], n), (heads[1], n), (heads[0], n_queries)
    rows = [mx.random.normal((batch, *shape, dim)).astype(mx.float16) for shape in shapes]
    mx.eval(rows)
    return Inputs(*rows)


def copies(*arrays: mx.array) -> list[list[mx.array]]:
    """As many copies of the arrays as it takes to outgrow the caches."""
    n_bytes = sum(array.nbytes for array in arrays)
    n = max(2, min(MOST_COPIES, -(-ROTATED_BYTES // n_bytes)))
    sets = [[array + mx.array(0, array.dtype) for array in arrays] for _ in range(n)]
    mx.eval(sets)
    return sets


def random_centre(n_kv_heads: int, dim: int) -> Centre:
    """A centre of normal noise."""
    rope = RopeFrequencies.from_arguments(dim, dim, False, THETA)
    return Centre(mx.random.normal((n_kv_heads, dim)), rope, "random")


def packed_attention(pair: str, x: Inputs, backend: Backend, how: str = "") -> Variant:
    """Attention over packed rows, causal where there are several queries.

    Args:
        how: centred, for centred keys; rows, for dequantising first and MLX's own attention.
    """
    _, n_kv_heads, n, dim = x.keys.shape
    layout, centre, keys = layout_of(pair, dim), None, x.keys
    if how == "centred":
        centre = random_centre(n_kv_heads, dim)
        keys = (keys + centre.rows(0, n)).astype(
            keys.dtype
        )  # as large without their centre as others
    first = backend.pack(keys, x.values, layout, **({"centre": centre} if centre else {}))
    views = [PackedKV(layout, body, n, empty_tiles(), 0, centre) for (body,) in copies(first)]
    scale, mask = dim**-0.5, mask_of(x)

    def call(i: int, queries: mx.array) -> mx.array:
        view = views[i % len(views)]
        if how == "rows":
            return dispatch._dequantized(queries, view, scale, mask, None, backend.rotated_rows)
        return dispatch.attention(queries, view, scale, mask, backend=backend)

    def check() -> tuple[float, float]:
        head = centre and Centre(centre.mu[:1], centre.rope, centre.source)
        one = views[0]._replace(body=views[0].body[:, :1], centre=head)
        rows = reference.dequantize(one, mx.float32)
        return attention_error(call(0, x.queries), x.queries, *rows, gqa_factor(x))

    return Variant(call, lambda: x.queries, first.nbytes, check)


def fp16_attention(x: Inputs) -> Variant:
    """MLX's fused attention over fp16 rows, causal where there are several queries."""
    sets, scale, mask = copies(x.keys, x.values), x.keys.shape[-1] ** -0.5, mask_of(x)

    def call(i: int, queries: mx.array) -> mx.array:
        keys, values = sets[i % len(sets)]
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    return Variant(call, lambda: x.queries, x.keys.nbytes + x.values.nbytes)


def kv_bits_attention(x: Inputs, bits: int) -> Variant:
    """mlx-lm's attention over its quantised cache, groups of 64."""
    from mlx_lm.models.base import quantized_scaled_dot_product_attention

    quantized = [mx.quantize(rows, group_size=64, bits=bits) for rows in (x.keys, x.values)]
    parts = [part for side in quantized for part in side]
    sets, scale = copies(*parts), x.keys.shape[-1] ** -0.5

    def call(i: int, queries: mx.array) -> mx.array:
        held = sets[i % len(sets)]
        own = mx.stop_gradient(queries)  # the function scales its argument in place
        return quantized_scaled_dot_product_attention(
            own, held[:3], held[3:], scale=scale, mask=None, group_size=64, bits=bits
        )

    def check() -> tuple[float, float]:
        one_head = ([part[:, :1] for part in side] for side in quantized)
        rows = [mx.dequantize(*side, group_size=64, bits=bits) for side in one_head]
        output = call(0, x.queries)
        return attention_error(output, x.queries, *rows, gqa_factor(x))[0], KV_BITS_ERROR

    return Variant(call, lambda: x.queries, sum(part.nbytes for part in parts), check)


def pack_chunk(pair: str, x: Inputs, backend: Backend) -> Variant:
    """Packs a prefill's step: reads fp16 rows, writes packed ones."""
    layout, sets = layout_of(pair, x.keys.shape[-1]), copies(x.keys, x.values)

    def call(i: int, last: None) -> mx.array:
        return backend.pack(*sets[i % len(sets)], layout)

    first = call(0, None)
    n_bytes = x.keys.nbytes + x.values.nbytes + first.nbytes
    return Variant(
        call, lambda: None, n_bytes, lambda: _pack_error(first, x, layout), chained=False
    )


def pack_token(pair: str, x: Inputs, backend: Backend) -> Variant:
    """Appends one token, ``x``, to a tail of N_KEPT rows."""
    _, n_kv_heads, _, dim = x.keys.shape
    layout = layout_of(pair, dim)
    before = noise((n_kv_heads, n_kv_heads), dim, N_KEPT)
    kept = backend.pack(before.keys, before.values, layout)
    mx.eval(kept)

    def call(i: int, tail: mx.array) -> mx.array:
        return backend.pack(x.keys, x.values, layout, tail, N_KEPT)

    def check() -> tuple[float, float]:
        rows = [mx.concatenate(sides, axis=2) for sides in zip(before[:2], x[:2])]
        return _pack_error(call(0, kept), Inputs(*rows, x.queries), layout)

    n_bytes = x.keys.nbytes + x.values.nbytes + 2 * kept.nbytes
    return Variant(call, lambda: kept, n_bytes, check)


def fp16_append(x: Inputs) -> Variant:
    """What mlx-lm's fp16 cache does with new rows: writes K and V into its buffers, in place."""
    _, n_kv_heads, n_new, dim = x.keys.shape
    sets, n_cache = copies(x.keys, x.values), 4 * n_new

    def start() -> list[mx.array]:
        return [mx.zeros((1, n_kv_heads, n_cache, dim), mx.float16) for _ in range(2)]

    def call(i: int, cache: list[mx.array]) -> list[mx.array]:
        at = i % 4 * n_new
        for side, rows in zip(cache, sets[i % len(sets)]):
            side[:, :, at : at + n_new] = rows
        return cache

    return Variant(call, start, 2 * (x.keys.nbytes + x.values.nbytes), in_place=True)


def rows_of(packed: PackedKV, backend: Backend) -> tuple[mx.array, mx.array]:
    """Half rows in the rotated basis, all heads at once."""
    n_kv_heads = packed.body.shape[1]
    return dequantize.rotated_rows(packed, mx.float16, 0, n_kv_heads, backend.name)


def dequantized_rows(pair: str, x: Inputs, backend: Backend) -> Variant:
    """Packed rows to half rows in the rotated basis."""
    n, dim = x.keys.shape[2:]
    layout = layout_of(pair, dim)
    first = backend.pack(x.keys, x.values, layout)
    views = [PackedKV(layout, body, n, empty_tiles(), 0) for (body,) in copies(first)]

    def call(i: int, last: None) -> tuple[mx.array, mx.array]:
        return rows_of(views[i % len(views)], backend)

    def check() -> tuple[float, float]:
        one_head = views[0]._replace(body=views[0].body[:, :1])
        want = reference._rotated(one_head.tiles, one_head)
        return max(
            _relative(a[:, :1], _float64(b)) for a, b in zip(call(0, None), want)
        ), ROWS_ERROR

    n_bytes = first.nbytes + x.keys.nbytes + x.values.nbytes
    return Variant(call, lambda: None, n_bytes, check, chained=False)


def layout_of(pair: str, dim: int) -> KVLayout:
    """The layout of a pair of formats, of rows of float16."""
    return KVLayout(*(KVFormat.parse(name) for name in pair.split("/")), dim, dim, "float16")


def mask_of(x: Inputs) -> str | None:
    """The mask of a generation step: causal where it has several queries."""
    return "causal" if x.queries.shape[2] > 1 else None


def gqa_factor(x: Inputs) -> int:
    return x.queries.shape[1] // x.keys.shape[1]


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _relative(got: mx.array, want: np.ndarray) -> float:
    return float(np.linalg.norm(_float64(got) - want) / np.linalg.norm(want))


def attention_error(output, queries, keys, values, gqa_factor: int) -> tuple[float, float]:
    """Relative error of the heads that read KV head 0, against float64 over the rows it holds.

    Shapes:
        output, queries: [B, n_heads, L, D]; keys, values: [B, 1, n, D], dequantised.
    """
    q, scale = queries[:, :gqa_factor], keys.shape[-1] ** -0.5
    scores = _float64(q) @ _float64(keys).swapaxes(-1, -2) * scale
    n_queries, n = scores.shape[-2:]
    scores[..., np.tri(n_queries, n, n - n_queries) == 0] = -np.inf  # the last query sees all
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    want = weights @ _float64(values) / weights.sum(axis=-1, keepdims=True)
    half = (rows.astype(mx.float16) for rows in (keys, values))
    mask = "causal" if n_queries > 1 else None
    plain = _relative(mx.fast.scaled_dot_product_attention(q, *half, scale=scale, mask=mask), want)
    return _relative(output[:, :gqa_factor], want), max(ERROR_RATIO * plain, ERROR_FLOOR)


def _pack_error(tiles: mx.array, x: Inputs, layout: KVLayout) -> tuple[float, float]:
    """How far packed rows are from those that the reference packs."""
    n = x.keys.shape[2]
    wanted = reference.pack(x.keys, x.values, layout)
    rows = [
        reference.dequantize(PackedKV(layout, empty_tiles(), 0, t, n), mx.float32)
        for t in (tiles, wanted)
    ]
    return max(_relative(a, _float64(b)) for a, b in zip(*rows)), PACK_ERROR
