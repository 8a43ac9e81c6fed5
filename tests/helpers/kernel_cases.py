"""Cases for every kernel, and the float64 attention that they are compared with.

Used by test_kernels.py on the CPU and by scripts/gpu_check.py on a GPU.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import asdict, dataclass
from itertools import combinations, product

import mlx.core as mx
import numpy as np

from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.centring.scales import PairScales
from mlx_turbokv.doctor.error_bound import attention
from mlx_turbokv.kernels import decode, dequantize, pack, reference
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.quant.codebook import boundaries
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout
from mlx_turbokv.quant.rotation import rotation_matrix, rotation_width
from mlx_turbokv.quant.tiles import tiles_to_rows

# a value this near to a decision boundary may have either code, in units of its scale
BOUNDARY = 1e-5
# bounds of attention's error are no larger than this part of the output, where it is not zero
MOST_BOUND = 0.1
# rows read back: float32 products of exact codes and scales
ROWS_ATOL = 1e-6
SCALE_ULPS = 1

# references run on the CPU: a GPU may round the operands of matrix products
ON_CPU = mx.stream(mx.cpu)


@dataclass(frozen=True)
class Case:
    """One combination: formats, shapes, dtype and edges."""

    k_format: str
    v_format: str
    dims: tuple[int, int]
    dtype: str = "float16"
    heads: tuple[int, int, int] = (1, 2, 4)  # sequences, KV heads, GQA factor
    n_queries: int = 1
    tokens: tuple[int, int] = (64, 7)  # in the body, in the tail
    edge: str = "plain"
    centred: str = ""  # RoPE of centred keys: apart (split pairs), traditional or partial
    splits: int = 1  # of decode

    @property
    def data(self) -> str:
        """What its rows and queries depend on; a part of the names in recorded runs."""
        return " ".join(str(value) for value in list(asdict(self).values())[:-1] if value != "")

    def __str__(self) -> str:
        return self.data + (f" in {self.splits}" if self.splits > 1 else "")


FORMATS = ("f16", "q8_0", "turbo2", "turbo3", "turbo4", "turbo5", "turbo6")
FORMATS += ("turbo2:32", "turbo3:32", "turbo5:32")
DIMS = ((128, 128), (64, 64), (72, 72), (80, 80), (96, 96), (112, 112), (160, 160), (192, 128))
DIMS += ((256, 256), (512, 512), (16, 48), (32, 64))
DTYPES = ("float16", "bfloat16", "float32")
HEADS = ((1, 1, 1), (1, 2, 4), (2, 1, 7), (1, 1, 16), (1, 3, 3), (3, 2, 2), (1, 1, 5))
QUERIES = (1, 2, 8)
TOKENS = ((0, 1), (0, 33), (32, 31), (96, 0), (64, 70), (544, 5))
SPLITS = (1, 3)
# causal: lower right; starts: left padding (recorded runs use this name); sinks: attention sinks;
# stale: NaN after the last row
EDGES = ("plain", "causal", "starts", "sinks", "stale")
# all scores about -136, less than what 2^x of float32 reaches, also with sinks as low; queries of
# zeros; queries and values 1,000 times as loud
EXTREMES = ("below", "below_sinks", "zero_queries", "loud_queries", "loud_values")
SCORE_BELOW, LOUD, QUIET, ABOVE = -136.0, 1000.0, 2e-7, 30.0
# and, in one case each: sinks above all scores (high_sinks); values close to the smallest scale
# (quiet_values); a key 1,000 times as loud that only the last query sees (future); one dim of V
# rotated has all, and later tokens' weights are as large as they may become, or too large (spiked);
# many tokens of which each is 2^-14 of the loudest one (crowd)
ROUND = 512  # tokens that all SIMD groups handle at a time
SPIKED_SCORES = np.log(2) * np.array([0, 3.9, 5.9])  # MARGIN is 4
CROWD_SCORE = 14 * np.log(2)


def all_pairs(values: dict[str, tuple], seed: int = 0) -> list[dict]:
    """Combinations that cover every pair of values of every two parameters, found greedily."""
    rng = random.Random(seed)
    names = list(values)
    missing = {
        (a, x, b, y)
        for a, b in combinations(names, 2)
        for x, y in product(range(len(values[a])), range(len(values[b])))
    }
    rows = []
    while missing:
        best, best_found = None, set()
        fixed = min(missing)
        for _ in range(30):
            row = {name: rng.randrange(len(values[name])) for name in names}
            row[fixed[0]], row[fixed[2]] = fixed[1], fixed[3]
            found = {(a, row[a], b, row[b]) for a, b in combinations(names, 2)} & missing
            if len(found) > len(best_found):
                best, best_found = row, found
        missing -= best_found
        rows.append({name: values[name][best[name]] for name in names})
    return rows


PAIRS = [
    Case(**row)
    for row in all_pairs(
        {
            "k_format": FORMATS,
            "v_format": FORMATS,
            "dims": DIMS,
            "dtype": DTYPES,
            "heads": HEADS,
            "n_queries": QUERIES,
            "tokens": TOKENS,
            "edge": EDGES,
            "splits": SPLITS,
        }
    )
]
SANITIZE_CASES = [
    Case("q8_0", "turbo2", (128, 128)),
    Case("turbo4", "turbo3", (64, 64), "float16", (1, 1, 3), 2, (32, 33), "causal", splits=2),
    Case("f16", "turbo5:32", (72, 80), "bfloat16", (2, 1, 1), 1, (0, 33), "starts"),
    Case("turbo6", "f16", (160, 96), "float32", (1, 1, 5), 1, (64, 1), "sinks", splits=3),
]
CENTRED = [
    Case(**row)
    for row in all_pairs(
        {
            "k_format": ("turbo2", "turbo3", "turbo4", "turbo5", "turbo6"),
            "v_format": ("turbo2", "turbo3", "f16"),
            "dims": ((128, 128), (64, 64), (72, 80), (256, 256), (512, 512), (16, 48)),
            "dtype": DTYPES,
            "heads": HEADS[:5],
            "n_queries": QUERIES,
            "tokens": TOKENS[:5],
            "edge": EDGES,
            "splits": SPLITS,
            "centred": ("apart", "traditional", "partial"),
        }
    )
]
SANITIZE_CASES += [
    Case("turbo4", "turbo3", (128, 128), heads=(1, 1, 4), centred="apart"),
    Case("turbo3", "turbo3", (64, 64), "float16", (2, 1, 3), 2, (32, 33), "starts", "partial"),
]
# heads with one scale a row
NARROW = [Case("q8_0", "q8_0", (32, 32)), Case("turbo4", "q8_0", (32, 16), "float32")]
# more splits than a merge loads at once
MANY = [Case("turbo4", "turbo2", (64, 64), tokens=(544, 5), splits=50)]
# more tiles than a SIMD group computes anchors for at once, with left padding of whole tiles or not
LONG = [
    Case("turbo4", "turbo3", (64, 64), heads=(1, 1, 2), tokens=(2112, 5), centred="apart"),
    Case(
        "turbo4",
        "turbo3",
        (64, 64),
        heads=(2, 1, 4),
        tokens=(1120, 5),
        edge="starts",
        centred="apart",
    ),
    Case(
        "turbo3", "turbo2", (128, 128), "bfloat16", (1, 1, 5), 2, (1120, 5), "plain", "traditional"
    ),
]
# several sequences and several KV heads, each with its mu
CENTRED_BATCH = [
    Case("turbo4", "turbo3", (64, 64), heads=(2, 3, 2), edge=edge, splits=splits, centred=centred)
    for edge, splits, centred in (
        ("plain", 1, "apart"),
        ("starts", 1, "apart"),
        ("starts", 3, "partial"),
        ("plain", 3, "traditional"),
    )
]
CENTRED_BATCH.append(
    Case("turbo3", "f16", (128, 128), "bfloat16", (3, 2, 2), 2, (96, 5), "starts", "apart", 3)
)
EXTREME = [
    Case(*formats, (64, 64), edge=edge, splits=splits, centred=centred, heads=(1, 2, 2))
    for formats, centred in ((("q8_0", "turbo2"), ""), (("turbo4", "turbo3"), "apart"))
    for edge in EXTREMES
    for splits in (1, 3)
]
EXTREME += [
    Case("f16", "q8_0", (64, 64), "bfloat16", edge=edge, splits=3)
    for edge in ("below_sinks", "loud_queries", "loud_values")
]
EXTREME += [
    Case("turbo4", "turbo3", (64, 64), "float32", edge=edge)
    for edge in ("below_sinks", "high_sinks")
]
EXTREME.append(Case("turbo4", "turbo3", (64, 64), "bfloat16", edge="quiet_values", splits=3))
EXTREME += [
    Case("f16", "turbo6", (64, 64), heads=(1, 1, 1), tokens=(n, 5), edge=edge)
    for n, edge in ((1088, "spiked"), (8192, "crowd"))
]
EXTREME.append(Case("turbo4", "turbo3", (64, 64), n_queries=2, edge="future"))
# as many blocks of anchors as the first table has, and more
LONGEST = [
    Case("turbo4", "turbo3", (64, 64), heads=(1, 1, 1), tokens=tokens, centred="apart", splits=5)
    for tokens in ((8192, 0), (8224, 5))
]
# q8_0 of rotated rows, also of centred keys, in heads that end within a group and that do not
TURBO8 = [
    Case(**row)
    for row in all_pairs(
        {
            "k_format": ("turbo8", "turbo8", "turbo4"),
            "v_format": ("turbo8", "turbo8", "f16"),
            "dims": ((128, 128), (64, 64), (72, 80), (256, 512)),
            "dtype": DTYPES,
            "heads": HEADS[:4],
            "n_queries": QUERIES,
            "tokens": TOKENS[1:5],
            "edge": EDGES,
            "splits": SPLITS,
            "centred": ("", "apart", "partial"),
        }
    )
]
# scale groups of 32 dims that lie in two rotation groups
STRADDLING = [
    Case("turbo8", "turbo3", (160, 160)),
    Case("turbo8", "turbo8", (144, 72), "bfloat16", (1, 2, 4), 2, (32, 33), "causal", "apart", 3),
    Case("turbo8", "f16", (224, 64), "float16", (2, 1, 3), 8, (64, 70), "starts"),
]
ALL_CASES = SANITIZE_CASES + PAIRS + CENTRED + NARROW + MANY + LONG
ALL_CASES += CENTRED_BATCH + EXTREME + LONGEST + TURBO8 + STRADDLING


def run_case(case: Case, backend: str) -> dict:
    """Pack, dequantise and attend as ``case`` says on ``backend``; lists what is wrong."""
    rng = np.random.default_rng(zlib.crc32(case.data.encode()))
    k_format, v_format = KVFormat.parse(case.k_format), KVFormat.parse(case.v_format)
    layout = KVLayout(k_format, v_format, *case.dims, case.dtype)
    failures: list[str] = []
    centre = _centre(case, rng)
    packed = _packed(case, layout, rng, backend, failures, centre)
    result = {"case": str(case), **_decode(case, packed, rng, backend, failures)}
    _rows(packed, backend, failures)
    result["failures"] = failures
    return result


def _rows_of(case: Case, dim: int, n: int, rng) -> mx.array:
    """Rows of different magnitudes, some of them zero."""
    batch, n_heads, _ = case.heads
    rows = rng.standard_normal((batch, n_heads, n, dim))
    rows *= np.exp(rng.standard_normal((batch, n_heads, n, 1)))
    rows *= rng.random((batch, n_heads, n, 1)) > 0.05
    return mx.array(rows.astype(np.float32)).astype(getattr(mx, case.dtype))


def _centre(case: Case, rng) -> Centre | None:
    """A mean larger than the variation of the keys; the slower pairs rotate by little."""
    if not case.centred:
        return None
    dim = case.dims[0]
    mu = 4 * rng.standard_normal((case.heads[1], dim)).astype(np.float32)
    dims = dim // 4 // 2 * 2 if case.centred == "partial" else dim
    rope = RopeFrequencies.from_arguments(dim, dims, case.centred == "traditional", 1e4)
    partial = case.centred == "partial"
    scales = None if partial else pair_scales(mu.shape, rope, rng)
    return Centre(mx.array(mu), rope, "case", 1, not partial, scales)


def with_anchors(x: mx.array, centre: Centre, padding: mx.array | None) -> mx.array:
    """Keys that are ``x`` once they are scaled and centred, in its dtype.

    Shapes:
        x: [B, H, n, head_dim]; padding: [B] int32.
    """
    keys = x + centre.rows(0, x.shape[2], padding)
    return (keys if centre.scales is None else centre.scales.unscaled(keys)).astype(x.dtype)


def pair_scales(shape: tuple[int, int], rope: RopeFrequencies, rng) -> PairScales:
    """Scales of pairs of dims, from about a half to two.

    Shapes:
        shape: KV heads, head_dim.
    """
    logs = rng.normal(scale=0.4, size=(shape[0], shape[1] // 2))
    return PairScales(mx.array(np.exp(logs).astype(np.float32)), rope)


def _direction(case: Case, dtype: mx.Dtype) -> mx.array:
    """What keys have too much and queries too little, for scores of SCORE_BELOW."""
    dim = case.dims[0]
    signs = np.random.default_rng(dim).choice((-1.0, 1.0), dim)
    return mx.array(signs * np.sqrt(-SCORE_BELOW / dim**0.5)).astype(dtype)


def _designed(case: Case, values: mx.array, rng) -> tuple[np.ndarray, mx.array]:
    """Scores and values of the edges spiked and crowd; scores differ, so that roundings do.

    Shapes:
        values: [B, H, n, v_head_dim]; returns: [n], and the values.
    """
    n = values.shape[2]
    scores, token = -0.05 * rng.random(n), np.arange(n)
    if case.edge == "spiked":
        spike = rotation_matrix(case.dims[1])[3] * case.dims[1] ** 0.5
        values = mx.broadcast_to(mx.array(spike).astype(values.dtype), values.shape)
        return scores + SPIKED_SCORES[token // ROUND], values
    # a loud token for each SIMD group, whose references differ
    loud = (token < ROUND) & (token % 64 == 5)
    same = mx.broadcast_to(values[:, :, :1], values.shape)
    return scores + CROWD_SCORE * loud, mx.where(mx.array(loud)[:, None], values, same)


def _left_padding(case: Case, n: int) -> np.ndarray | None:
    """Rows before the first token of each sequence; the last sequence has no token."""
    if case.edge != "starts":
        return None
    return np.linspace(n // 2, n, case.heads[0]).astype(np.int32)


def _packed(
    case: Case, layout: KVLayout, rng, backend: str, failures: list[str], centre: Centre | None
) -> PackedKV:
    """A body and a tail, packed by the kernel in three steps and checked against the reference."""
    n_body, n_tail = case.tokens
    n_stale = 9 if case.edge == "stale" else 0
    keys = _rows_of(case, case.dims[0], n_body + n_tail, rng)
    values = _rows_of(case, case.dims[1], n_body + n_tail, rng)
    if case.edge == "loud_values":
        values = mx.clip(LOUD * values, -6e4, 6e4)
    if case.edge == "quiet_values":
        values = QUIET * values
    if case.edge == "future":
        keys = mx.where(mx.arange(keys.shape[2])[:, None] == keys.shape[2] - 1, LOUD, 1) * keys
    if case.edge in ("spiked", "crowd"):
        scores, values = _designed(case, values, rng)
        rows = mx.array(scores / case.dims[0] ** 0.5)[:, None]
        keys = mx.broadcast_to(rows, keys.shape).astype(keys.dtype)
    if case.edge.startswith("below"):
        keys = keys + _direction(case, keys.dtype)
    body = tail = empty_tiles()
    padding = None
    if centre is not None:
        rows = _left_padding(case, n_body + n_tail)
        padding = None if rows is None else mx.array(rows)
        keys = with_anchors(keys, centre, padding)

    def at(first: int) -> dict:
        return {} if centre is None else {"centre": centre, "first": first, "left_padding": padding}

    if n_body:
        k, v = keys[:, :, :n_body], values[:, :, :n_body]
        body = pack.pack(keys, values, layout, backend=backend, part=(0, n_body), **at(0))
        _check_pack(body, k, v, layout, failures, at(0))
        if n_stale:
            ones = mx.full((*body.shape[:2], 2, body.shape[3]), 0xFFFFFFFF, mx.uint32)
            body = mx.concatenate([body, ones], 2)
    if n_tail:
        k, v = keys[:, :, n_body:], values[:, :, n_body:]
        first = max(1, n_tail // 2)
        part = (n_body, n_body + n_tail)
        at_once = pack.pack(keys, values, layout, backend=backend, part=part, **at(0))
        _check_pack(at_once, k, v, layout, failures, at(n_body))
        tail = pack.pack(k[:, :, :first], v[:, :, :first], layout, backend=backend, **at(n_body))
        if n_stale:
            nan_k, nan_v = (mx.full((*k.shape[:2], n_stale, d), mx.nan, k.dtype) for d in case.dims)
            tail = pack.pack(nan_k, nan_v, layout, tail, first, backend=backend)
        if first < n_tail:
            rest = k[:, :, first:], v[:, :, first:], layout, tail, first
            tail = pack.pack(*rest, backend=backend, **at(n_body + first))
        exact_size = first < n_tail or not n_stale
        _check_pack(tail, k, v, layout, failures, at(n_body), exact_size)
        if n_stale:
            tail = pack.pack(nan_k, nan_v, layout, tail, n_tail, backend=backend)
    return PackedKV(layout, body, n_body, tail, n_tail, centre, padding)


def _check_pack(tiles, keys, values, layout, failures, at: dict, exact_size=True) -> None:
    """Codes equal the reference's except at boundaries, scales to an ulp; unused rows are zero."""
    with ON_CPU:
        expected = reference.pack(keys, values, layout, **at)
        if at:
            centre = at["centre"]
            rows = centre.rows(at["first"], keys.shape[2], at["left_padding"])
            keys = centre.scaled(keys)
            rounding = _anchor_rounding(centre) + _product_rounding(keys)
            keys = keys - rows
    if not at:
        rounding = np.zeros((keys.shape[1], keys.shape[3]))
    if not exact_size:  # stale rows follow
        tiles = tiles[:, :, : expected.shape[2]]
    n = keys.shape[2]
    with ON_CPU:
        got, want = tiles_to_rows(tiles, layout), tiles_to_rows(expected, layout)
    for name, fmt, x in (("k", layout.k_format, keys), ("v", layout.v_format, values)):
        units, wanted = np.array(getattr(got, name)), np.array(getattr(want, name))
        if exact_size and units[:, :, n:].any():
            failures.append(f"pack: {name} rows after the last are not zero")
        different = np.argwhere(units[:, :, :n] != wanted[:, :, :n])
        unsure = rounding if name == "k" else np.zeros((x.shape[1], x.shape[3]))
        if len(different) and not _near_boundaries(different, units, x, fmt, unsure):
            failures.append(f"pack: {len(different)} {name} units differ")
        scales = np.array(getattr(got, f"{name}_scales")[:, :, :n].view(mx.uint16)).astype(int)
        wanted = np.array(getattr(want, f"{name}_scales")[:, :, :n].view(mx.uint16)).astype(int)
        if np.abs(scales - wanted).max(initial=0) > SCALE_ULPS and not len(different):
            failures.append(f"pack: {name} scales differ by {np.abs(scales - wanted).max()} ulps")
        if np.any(_sizes(scales) > _largest(wanted, unsure)):
            failures.append(f"pack: {name} rows of nothing have scales of more than rounding")


def _sizes(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def _largest(wanted: np.ndarray, unsure: np.ndarray) -> np.ndarray:
    """The largest scale allowed where the reference's is zero: the norm of a row's rounding."""
    return np.where(wanted == 0, np.linalg.norm(unsure, axis=-1)[:, None, None], np.inf)


def _anchor_rounding(centre: Centre) -> np.ndarray:
    """The float32 rounding error of each dim of an anchor: [H, head_dim].

    An anchor is the sum of two products, of mu and a cosine and of mu and a sine. Compilers may
    fuse one product with the sum, which changes the result by an ulp of the product and of the
    sum. A key that equals its anchor is mere rounding after the subtraction: an ulp changes codes.
    """
    mu = np.abs(np.array(centre.mu, np.float64))
    first, second = centre.rope.pairs()
    other = np.empty_like(mu)
    other[:, first], other[:, second] = mu[:, second], mu[:, first]
    return 2.0**-23 * (mu + other)


def _product_rounding(keys: mx.array) -> np.ndarray:
    """What is lost where a key's product with its scale is fused with the subtraction or is not.

    Shapes:
        keys: [B, H, L, head_dim], times their scales; returns: [H, head_dim].
    """
    return 2.0**-24 * np.abs(np.array(keys, np.float64)).max(axis=(0, 2))


def _near_boundaries(different, units, x, fmt, unsure) -> bool:
    """Whether every unit that differs has a value next to a decision boundary.

    Args:
        unsure: the rounding error of each dim before the rotation, [H, head_dim]. Rotated values
            are off by at most its norm.
    """
    if not fmt.is_turbo:
        return False
    dim, width = x.shape[-1], fmt.group_width(x.shape[-1])
    rotation = rotation_matrix(rotation_width(dim)).astype(np.float64)
    rows = np.array(x.astype(mx.float32)).astype(np.float64)
    y = (rows.reshape(*rows.shape[:-1], -1, len(rotation)) @ rotation.T).reshape(rows.shape)
    if not fmt.has_codebook:
        return _near_halves(different, y, width, unsure, len(rotation))
    per_unit = dim // units.shape[-1]
    thresholds = boundaries(fmt.bits, width).astype(np.float64)
    for *row, unit in different:
        first = unit * per_unit // width * width
        group = y[(*row, slice(first, first + width))]
        raw = np.sqrt((group**2).mean())
        off = np.linalg.norm(
            unsure[row[1]][first // len(rotation) * len(rotation) :][: len(rotation)]
        )
        if raw <= off:  # nothing but rounding
            if off == 0:
                return False
            continue
        near = y[(*row, slice(unit * per_unit, (unit + 1) * per_unit))] / raw
        if np.abs(near[:, None] - thresholds).min() > BOUNDARY + off / raw:
            return False
    return True


def _near_halves(different, y: np.ndarray, width: int, unsure: np.ndarray, rotated: int) -> bool:
    """The same of turbo8: a value next to the middle of two codes, or a scale of two numbers.

    Args:
        rotated: dims of a rotation.
    """
    for *row, unit in different:
        group = y[(*row, slice(unit // width * width, unit // width * width + width))]
        off = np.linalg.norm(unsure[row[1]][unit // rotated * rotated :][:rotated])
        most = np.abs(group).max()
        if 0 < most <= off:  # nothing but rounding
            continue
        spread = most * BOUNDARY + off
        scales = ((most + np.array([-1, 0, 1]) * spread) / 127).astype(np.float16)
        scale = scales[1].astype(np.float64)
        near = y[(*row, unit)] / scale
        if len(set(scales)) == 1 and abs(near - np.floor(near) - 0.5) > spread / scale:
            return False
    return True


def _decode(case: Case, packed: PackedKV, rng, backend: str, failures: list[str]) -> dict:
    """Attention against float64 over the rows that are stored."""
    batch, n_kv_heads, gqa = case.heads
    n_heads, dtype = n_kv_heads * gqa, getattr(mx, case.dtype)
    causal = case.edge in ("causal", "future") and case.n_queries <= packed.n_tokens
    sinks = left_padding = None
    if case.edge == "starts":
        left_padding = mx.array(_left_padding(case, packed.n_tokens))
    scale = case.dims[0] ** -0.5
    seen = _seen(case.n_queries, packed.n_tokens, causal, left_padding, batch)
    queries = _noise(rng, (batch, n_heads, case.n_queries, case.dims[0]), dtype)
    if case.edge == "zero_queries":
        queries = mx.zeros_like(queries)
    if case.edge in ("spiked", "crowd"):  # so that the scores are those of _designed
        queries = mx.ones_like(queries)
    if case.edge == "loud_queries":
        queries = LOUD * queries
    if case.edge.startswith("below"):
        queries = queries - _direction(case, dtype)
    if case.edge.endswith("sinks"):
        level = {"below_sinks": SCORE_BELOW, "high_sinks": ABOVE}.get(case.edge, 0.0)
        sinks = _noise(rng, (n_heads,), dtype) + mx.array(level, dtype)
    output = decode.decode(
        queries, packed, scale, causal, sinks, left_padding, backend=backend, splits=case.splits
    )
    truth = attention(queries, packed, scale, seen, sinks)
    error, ratio = _relative_error(output, truth.output), truth.ratio(output)
    if not ratio <= 1:
        failures.append(f"decode: an error is {ratio:.2f} times its bound; in all {error:.2e}")
    if not np.linalg.norm(truth.bound) <= MOST_BOUND * (np.linalg.norm(truth.output) or np.inf):
        failures.append("decode: the bound says little")
    return {"decode_error": error, "decode_of_bound": ratio}


def _noise(rng, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def _seen(n_queries: int, n: int, causal: bool, left_padding, batch: int) -> np.ndarray:
    """The mask of tokens that each query of each sequence attends to: [B, 1, L, n]."""
    seen = np.ones((batch, 1, n_queries, n), bool)
    if causal:
        seen &= np.arange(n) <= np.arange(n - n_queries, n)[:, None]
    if left_padding is not None:
        seen &= np.arange(n) >= np.array(left_padding)[:, None, None, None]
    return seen


def _relative_error(output: mx.array, truth: np.ndarray) -> float:
    got = np.array(output.astype(mx.float32)).astype(np.float64)
    norm = np.linalg.norm(truth)
    return float(np.linalg.norm(got - truth) / (norm or 1.0))


def _rows(packed: PackedKV, backend: str, failures: list[str]) -> None:
    """Rows that the dequantize kernel gives, against the reference's."""
    n_heads = (packed.body if packed.n_body else packed.tail).shape[1]
    with ON_CPU:
        expected = reference._rotated(packed.tiles, packed)
    allowed = {"keys": ROWS_ATOL, "values": ROWS_ATOL}
    if packed.centre is not None:  # sums of products in another order
        allowed["keys"] += (
            1e-6 * mx.abs(packed.centre.mu).max().item() * packed.layout.k_head_dim**0.5
        )
    first = n_heads // 2
    got = dequantize.rotated_rows(packed, mx.float32, first, n_heads - first, backend)
    for name, rows, want in zip(("keys", "values"), got, expected):
        error = np.abs(np.array(rows) - np.array(want)[:, first:]).max()
        if not error <= allowed[name]:
            failures.append(f"dequantize: {name} differ by {error:.2e}")
