"""Cases of decode over protected tokens, and the float64 attention that they are compared with.

Used by test_protected_kernels.py on the CPU and by scripts/gpu_check.py on a GPU.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from kernel_cases import MOST_BOUND, ON_CPU, all_pairs, pair_scales, with_anchors

from mlx_turbokv.attention.dispatch import row_dtype
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.doctor import error_bound
from mlx_turbokv.kernels import decode, reference
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.kernels.segment_rows import segment_rows
from mlx_turbokv.kernels.segments import SegmentedKV
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import TILE, KVLayout, protected_layout
from mlx_turbokv.quant.rotation import rotation_matrix, rotation_width

# an element's error over the largest value of its output row; a row that is farther off may be so
# by no more than rounding explains (error_bound.py)
ACCEPTED = {"float16": 2e-3, "bfloat16": 6e-3, "float32": 3e-6}
# rows read back, in float32: of products of codes and scales, and of sums of as many products as
# there are dims; over the largest value
ROWS_OFF = 1e-6
HALF_UNIT = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # of the largest value
STALE_TILES, N_FRESH = 2, 41


@dataclass(frozen=True)
class Shape:
    """Where rows lie, as kernels/segments.py has it.

    Args:
        ends: rows of the body by sequence; of all sequences the last one's where there are more.
        starts: left padding by sequence, likewise.
        newest: whether the tail's rows are protected.
    """

    n: int
    tail_start: int
    ends: tuple[int, ...]
    sink: int = 32
    n_sunk: int | None = None
    starts: tuple[int, ...] = (0,)
    newest: bool = True


SHAPES = {
    "three segments": Shape(300, 128, (128,)),
    "an empty body": Shape(70, 0, (0,), n_sunk=0),
    "no first tokens": Shape(299, 96, (96,), sink=0),
    "whole tiles": Shape(256, 128, (128,), sink=64),
    "a body into the tail": Shape(230, 128, (128, 141, 159)),
    "a tail all in the body": Shape(140, 128, (140,)),
    "padding within the first tokens": Shape(301, 128, (128, 133, 128), starts=(0, 45, 77)),
    "padding past the body": Shape(330, 96, (96, 96, 96), n_sunk=310, starts=(3, 300, 320)),
    "padding of whole tiles": Shape(330, 192, (192, 200), starts=(64, 0)),
    "tokens that are all first ones": Shape(330, 96, (96,), starts=(3, 300, 318)),
    "a long tail": Shape(1200, 64, (64,)),
    "a long body": Shape(1500, 1376, (1376,)),
    "bodies of two lengths": Shape(1460, 1280, (1376, 1280), starts=(0, 500)),
    "first tokens alone, long": Shape(1300, 1280, (1280,), newest=False),
    "first tokens alone": Shape(300, 288, (288,), newest=False),
    "first tokens alone, padded": Shape(300, 288, (288,), starts=(0, 45), newest=False),
}


@dataclass(frozen=True)
class SegmentCase:
    """One combination: formats, head_dim, dtype, heads, queries and where rows lie."""

    formats: tuple[str, str]
    dim: int
    dtype: str
    heads: tuple[int, int, int]  # sequences, KV heads, GQA factor
    n_queries: int
    shape: str
    edge: str = "causal"  # or plain, sinks
    centred: bool = False
    splits: int | None = 1
    v_dim: int = 0  # where it is not ``dim``

    def __str__(self) -> str:
        values = asdict(self)
        if not self.v_dim:
            del values["v_dim"]
        values["formats"] = "/".join(self.formats)
        return "protected " + " ".join(str(value) for value in values.values())


VALUES: dict[str, tuple] = {
    "formats": (("turbo4", "turbo3"), ("q8_0", "turbo2"), ("f16", "turbo5"), ("turbo3:32", "f16")),
    "dim": (64, 128, 80),
    "dtype": ("float16", "bfloat16", "float32"),
    "heads": ((1, 2, 4), (3, 1, 3)),
    "n_queries": (1, 2, 8),
    "shape": tuple(SHAPES),
    "edge": ("causal", "sinks", "plain"),
    "centred": (False, True),
    "splits": (1, 3),
}
CASES = [SegmentCase(**row) for row in all_pairs(VALUES)]
# other formats, and wide heads
CASES += [
    SegmentCase(("turbo2", "turbo2"), 256, "float16", (1, 2, 4), 2, "three segments", centred=True),
    SegmentCase(("turbo6", "q8_0"), 64, "float16", (2, 1, 3), 1, "a body into the tail", splits=3),
    SegmentCase(("q8_0", "q8_0"), 128, "bfloat16", (1, 1, 5), 8, "a long tail", splits=3),
    SegmentCase(
        ("turbo4", "turbo3"), 64, "float16", (3, 1, 3), 8, "tokens that are all first ones"
    ),
    SegmentCase(("turbo5", "turbo6"), 512, "float16", (1, 1, 2), 1, "no first tokens"),
    # scale groups of 32 dims that lie in two rotation groups
    SegmentCase(("turbo4", "turbo3"), 160, "float16", (1, 2, 4), 1, "three segments"),
    SegmentCase(
        ("turbo4", "turbo3"),
        144,
        "bfloat16",
        (2, 1, 3),
        2,
        "a body into the tail",
        centred=True,
        splits=3,
    ),
]
# bodies of several steps in every cut: 8 SIMD groups take 512 tokens in one
STEPS = [
    SegmentCase(pair, 128, "float16", (1, 2, 4), 1, shape, centred=centred, splits=splits)
    for pair, centred in ((("turbo4", "turbo3"), True), (("q8_0", "turbo2"), False))
    for shape in ("a long body", "first tokens alone, long")
    for splits in (1, 2)
]
# several of several KV heads; K and V of two head_dims
CASES += [
    SegmentCase(("turbo4", "turbo3"), 64, "float16", (2, 4, 2), 2, "a body into the tail"),
    SegmentCase(
        ("turbo4", "turbo3"), 64, "bfloat16", (3, 4, 1), 1, "padding within the first tokens",
        centred=True, splits=3,
    ),
    SegmentCase(("q8_0", "turbo2"), 128, "float16", (2, 2, 2), 1, "three segments", v_dim=64),
    SegmentCase(
        ("turbo3", "turbo4"), 64, "float16", (1, 4, 2), 2, "padding of whole tiles", centred=True,
        v_dim=96,
    ),
]  # fmt: skip
CASES += STEPS


def _centre(case: SegmentCase, rng) -> Centre | None:
    if not case.centred or not case.formats[0].startswith("turbo"):
        return None
    mu = 4 * rng.standard_normal((case.heads[1], case.dim)).astype(np.float32)
    rope = RopeFrequencies.from_arguments(case.dim, case.dim, False, 1e4)
    return Centre(mx.array(mu), rope, "case", 1, True, pair_scales(mu.shape, rope, rng))


def _by_sequence(values: tuple[int, ...], batch: int) -> list[int]:
    return [values[min(b, len(values) - 1)] for b in range(batch)]


def _noise(rng, shape: tuple[int, ...], dtype: str) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(getattr(mx, dtype))


def _basis(fmt: KVFormat, dim: int) -> np.ndarray:
    """What brings a row into the basis that it is stored in."""
    width = rotation_width(dim) if fmt.is_turbo else 1
    rotation = rotation_matrix(width).astype(np.float64) if fmt.is_turbo else np.ones((1, 1))
    return np.kron(np.eye(dim // width), rotation)


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def build(case: SegmentCase) -> tuple[SegmentedKV, np.ndarray, np.ndarray]:
    """Protected rows that the reference packed, and what each row is, in float64.

    Shapes:
        returns: also K and V, [B, H, n, dim].
    """
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    shape, (batch, n_heads, _) = SHAPES[case.shape], case.heads
    n, dim, start = shape.n, case.dim, shape.tail_start
    starts, ends = (_by_sequence(x, batch) for x in (shape.starts, shape.ends))
    n_sunk = n if shape.n_sunk is None else shape.n_sunk
    dims = dim, case.v_dim or dim
    layout = KVLayout(*(KVFormat.parse(name) for name in case.formats), *dims, case.dtype)
    fine, centre = protected_layout(layout), _centre(case, rng)
    tail_layout = fine if shape.newest else layout
    n_body = -(-max(start, *ends) // TILE) * TILE
    with ON_CPU:
        padding = mx.array(starts, mx.int32) if any(starts) else None
        keys, values = (_noise(rng, (batch, n_heads, n, own), case.dtype) for own in dims)
        options: dict[str, Any] = {}
        if centre is not None:
            keys = with_anchors(keys, centre, padding)
            options = {"centre": centre, "left_padding": padding}

        # packed once: rows packed apart may differ in codes at a decision boundary
        whole = {own: reference.pack(keys, values, own, **options) for own in (layout, fine)}
        body, tail = empty_tiles(), empty_tiles()
        if start < n:
            tail = whole[tail_layout][:, :, start // TILE :]
        if n_body:
            body = whole[layout][:, :, : n_body // TILE]
            stale = mx.full((batch, n_heads, STALE_TILES, layout.tile_words), 2**32 - 1, mx.uint32)
            body = mx.concatenate([body, stale], axis=2)
        sink = empty_tiles()
        if shape.sink:
            index = mx.arange(shape.sink) + mx.array(starts)[:, None]
            index = mx.clip(index, 0, n - 1)[:, None, :, None]
            first = (mx.take_along_axis(x, index, axis=2) for x in (keys, values))
            at = {} if centre is None else {"centre": centre, "first": 0}
            sink = reference.pack(*first, fine, **at)
        rows = []
        for own in (layout, fine):
            held = PackedKV(own, empty_tiles(), 0, whole[own], n, centre, padding)
            rows.append([_float64(x) for x in reference._rotated(held.tiles, held)])
        if shape.sink:
            held = PackedKV(fine, empty_tiles(), 0, sink, shape.sink, centre)
            for side, own_rows in zip(rows[1], reference._rotated(sink, held)):
                for b, at_row in enumerate(starts):
                    k = max(0, min(shape.sink, n_sunk - at_row))
                    side[b, :, at_row : at_row + k] = _float64(own_rows)[b, :, :k]
        mx.eval(body, tail, sink)
    found = SegmentedKV(
        layout, tail_layout, fine, sink, shape.sink, n_sunk, body, n_body, tail, start, n - start,
        tuple(ends), tuple(starts), centre,
    )  # fmt: skip
    number, first = np.arange(n), np.array(starts)[:, None]
    sunk = (number >= first) & (number < first + shape.sink) & (number < n_sunk)
    newest = (number >= np.array(ends)[:, None]) & shape.newest
    is_fine = (sunk | newest)[:, None, :, None]
    keys, values = (np.where(is_fine, y, x) for x, y in zip(*rows))
    return found, keys, values


def _wrong_rows(found: SegmentedKV, want: list[np.ndarray], backend: str) -> list[str]:
    """What is wrong with the rows that are read, of about the second third of the KV heads.

    Without rows that are not packed, and with some, larger than the others; in float32, and as
    attention takes them.
    """
    layout, n_heads = found.layout, want[0].shape[1]
    first, count = n_heads // 3 or n_heads // 2, max(1, n_heads // 2)
    heads = slice(first, first + count)
    sides = (layout.k_format, layout.k_head_dim), (layout.v_format, layout.v_head_dim)
    with ON_CPU:
        rng, shape = np.random.default_rng(n_heads), (*found.newest.shape[:2], N_FRESH)
        three = mx.array(3.0, getattr(mx, layout.dtype))
        fresh = [three * _noise(rng, (*shape, dim), layout.dtype) for _, dim in sides]
        mx.eval(fresh)
    turned = [_float64(x) for x in fresh]
    if found.centre is not None:
        turned[0] = turned[0] * _float64(found.centre.scales.of_dims)[:, None]
    turned = [x @ _basis(*side).T for x, side in zip(turned, sides)]
    both = [np.concatenate(pair, axis=2) for pair in zip(want, turned)]
    newest = found._replace(fresh=tuple(fresh))
    cases = [(found, want), (newest, both)]
    if found.centre is None and not found.n_sink:  # sequences may begin among the new rows
        starts = (found.n_tokens + 9,) * len(found.starts)
        cases.append((newest._replace(starts=starts), both))
    wrong = []
    for dtype in (mx.float32, row_dtype(layout, getattr(mx, layout.dtype))):
        accepted = ROWS_OFF + HALF_UNIT[dtype]
        for held, rows in cases:
            got = segment_rows(held, dtype, (first, count), backend)
            for name, own, expected in zip("KV", got, rows):
                expected = expected[:, heads]
                off = np.abs(_float64(own) - expected).max() / np.abs(expected).max()
                if own.shape != expected.shape or not off <= accepted:
                    wrong.append(f"rows: {name} in {dtype} off by {off:.1e}")
    return wrong


def run_segment_case(case: SegmentCase, backend: str) -> dict:
    """Attend and read rows as ``case`` says on ``backend``; lists what is wrong."""
    found, keys, values = build(case)
    rows = [keys, values]
    batch, n_kv_heads, gqa = case.heads
    rng = np.random.default_rng(7)
    with ON_CPU:
        queries = _noise(rng, (batch, n_kv_heads * gqa, case.n_queries, case.dim), case.dtype)
        sinks = _noise(rng, (n_kv_heads * gqa,), case.dtype) if case.edge == "sinks" else None
        mx.eval(queries)
    causal, scale = case.edge == "causal", case.dim**-0.5
    output = decode.decode(
        queries, found, scale, causal, sinks, found.left_padding, backend=backend,
        splits=case.splits,
    )  # fmt: skip
    number = np.arange(found.n_tokens)
    seen = number >= np.array(found.starts)[:, None, None, None]
    if causal:
        seen = seen & (number <= number[-case.n_queries :, None])
    layout = found.layout
    q = scale * _float64(queries)
    if found.centre is not None:
        q = q / np.repeat(_float64(found.centre.scales.of_dims), gqa, axis=0)[:, None]
    q = q @ _basis(layout.k_format, case.dim).T
    keys, values = (np.repeat(x, gqa, axis=1) for x in (keys, values))
    scores = np.where(seen, q @ keys.swapaxes(-1, -2), -np.inf)
    if sinks is not None:
        own = np.broadcast_to(_float64(sinks)[:, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, own], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    want = weights[..., : found.n_tokens] @ values @ _basis(layout.v_format, layout.v_head_dim)
    off = np.abs(_float64(output) - want).max(axis=-1) / np.abs(want).max(axis=-1)
    error = float(np.where(np.isfinite(off), off, np.inf).max())
    of_bound = error / ACCEPTED[case.dtype]
    wrong = []
    if of_bound > 1:
        each = np.broadcast_to(seen, (batch, 1, case.n_queries, found.n_tokens))
        rounding = error_bound.attention(queries, found, scale, each, sinks)
        of_bound = rounding._replace(output=want).ratio(output)
        if not np.linalg.norm(rounding.bound) <= MOST_BOUND * np.linalg.norm(want):
            wrong.append("decode: the bound says little")
    if not of_bound <= 1:
        wrong.append(f"decode: off by {error:.1e}")
    wrong += _wrong_rows(found, rows, backend)
    return {
        "case": str(case), "decode_error": error, "decode_of_bound": of_bound, "failures": wrong
    }  # fmt: skip
