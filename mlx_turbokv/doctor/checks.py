"""Checks the kernels of one variant against a reference.

A GPU back-end is compared with the reference ops, which run on the CPU; the reference back-end is
compared with float64 NumPy. What reads rows is given those that the reference packed, so a broken
pack kernel fails alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..attention import dispatch
from ..kernels import decode, reference
from ..kernels.agreement import CheckError, codes_and_scales, compare_rows
from ..kernels.backend import Backend
from ..kernels.packed import PackedKV
from ..kernels.segments import AnyKV, scales_of
from ..quant.layout import TILE
from ..quant.rotate import rotate
from ..quant.tiles import code_bits, first_rows_mask, tiles_to_rows
from . import error_bound, oracle
from .cases import N_KV_HEADS, N_ROWS, Case
from .oracle import float64
from .tolerances import ATTENTION, MANY_QUERIES, ROWS, THROUGH_ROWS
from .variants import Variant

N_KEPT = 5  # rows that are in the tail before others are packed
N_FRESH = 21  # rows that are not packed yet
OF_PROTECTED = {"protected", "segments"}  # jobs of variants with protected tokens
N_SPLITS = 3


class Outcome(NamedTuple):
    """Result of one job of one variant; ``message`` is the error, None if there is none."""

    job: str
    error: float
    message: str | None
    seconds: float


def run_variant(
    variant: Variant, backend: Backend, skip: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Outcome | None]]:
    """Check the jobs of one variant; yields (job, None) before each and (job, outcome) after."""
    case = Case(variant)
    for job, check in CHECKS.items():
        if job in skip or (job in OF_PROTECTED and not variant.protected):
            continue
        yield job, None
        start = time.perf_counter()
        try:
            error, message = check(case, backend), None
        except CheckError as failure:
            error, message = math.nan, str(failure)
        except Exception as failure:  # what MLX raises on a text that does not compile
            error, message = math.nan, f"{type(failure).__name__}: {failure}"
        yield job, Outcome(job, error, message, time.perf_counter() - start)


def check_pack(case: Case, backend: Backend) -> float:
    """Append rows to a tail; returns the share of codes that differ.

    Raises:
        CheckError: as all checks, where a comparison does not hold.
    """
    layout, tail = case.layout, case.reference_tiles(0, N_KEPT)
    new = case.rows(N_KEPT, N_ROWS)
    tiles = backend.pack(*new, layout, tail, N_KEPT, **case.centre_at(N_KEPT))
    mx.eval(tiles)
    want = case.reference_tiles()
    with mx.stream(mx.cpu):
        free = tiles[:, :, -1] & ~first_rows_mask(layout, N_ROWS % TILE)
        if free.any().item():
            raise CheckError("rows behind the last are not zero")
        if want.shape != tiles.shape:
            raise CheckError(f"shape {tiles.shape} instead of {want.shape}")
        got, wanted = tiles_to_rows(tiles, layout), tiles_to_rows(want, layout)
        keys = case.keys
        if case.centre is not None:
            keys = case.centre.scaled(keys) - case.centre.rows(0, N_ROWS)
        mx.eval(got, wanted, keys)
    share = 0.0
    for side, fmt, x in (("k", layout.k_format, keys), ("v", layout.v_format, case.values)):
        bits = code_bits(fmt, layout.itemsize)
        codes, scales = codes_and_scales(got, side, bits, N_ROWS)
        if backend.name == "reference" and not fmt.is_f16:
            expected = oracle.quantized(float64(x), fmt)
        else:
            expected = codes_and_scales(wanted, side, bits, N_ROWS)
        share = max(share, compare_rows(side.upper(), fmt, codes, scales, *expected))
    return share


def check_decode(case: Case, backend: Backend) -> float:
    """One query with a GQA factor of 4, unsplit and split; then the variant's own shape."""
    return _check_attention(case, backend, case.packed(), case.variant.edge)


def check_protected(case: Case, backend: Backend) -> float:
    """The same of rows of which the first and the newest are protected, without left padding."""
    edge = case.variant.edge
    return _check_attention(case, backend, case.segmented(), "plain" if edge == "starts" else edge)


def _check_attention(case: Case, backend: Backend, packed: AnyKV, own_edge: str) -> float:
    v, worst = case.variant, 0.0
    split = [] if backend.name == "reference" else [(4, 1, "plain", N_SPLITS)]
    own = (v.gqa_factor, v.n_queries, own_edge, None)
    for gqa, n_queries, edge, splits in [(4, 1, "plain", None), *split, own]:
        error, of_allowed = _attention_error(case, backend, packed, gqa, n_queries, edge, splits)
        if not of_allowed <= 1:
            shape = f"GQA factor {gqa}, {n_queries} queries, {edge}"
            shape += f", {splits} splits" if splits else ""
            raise CheckError(
                f"relative error {error:.1e}, {of_allowed:.1f} times what is allowed ({shape})"
            )
        worst = max(worst, error)
    return worst


def check_dequantize(case: Case, backend: Backend) -> float:
    """Read rows back, and attention of many queries over them."""
    worst = _check_rows(case, backend, case.packed(), mx.float32)
    _check_many_queries(case, backend, case.packed())
    return worst


def check_segments(case: Case, backend: Backend) -> float:
    """The same where the first and newest rows are protected; rows also where some are not packed.

    They are read in half and the like too, as attention does, and with protected first rows alone.
    """
    worst = _check_rows(case, backend, case.segmented(N_FRESH), mx.float32)
    if backend.name != "reference":
        dtype = dispatch.row_dtype(case.layout, case.dtype)
        for newest in (True, False):
            _check_rows(case, backend, case.segmented(N_FRESH, newest), dtype)
    _check_many_queries(case, backend, case.segmented())
    return worst


def _check_rows(case: Case, backend: Backend, packed: AnyKV, dtype: mx.Dtype) -> float:
    """A kernel's rows in ``dtype``, which are rotated back on the CPU, in float32."""
    if backend.name == "reference":
        got, want = backend.dequantize(packed, dtype), oracle.rows_of(packed)
    else:
        assert backend.rotated_rows is not None
        got = list(backend.rotated_rows(packed, dtype, 0, N_KV_HEADS))
        mx.eval(got)
        with mx.stream(mx.cpu):
            got = [rows.astype(mx.float32) for rows in got]
            for i, fmt in enumerate((case.layout.k_format, case.layout.v_format)):
                if fmt.is_turbo:
                    got[i] = rotate(got[i], got[i].shape[-1], inverse=True)
            if (scales := scales_of(packed)) is not None:
                got[0] = scales.unscaled(got[0])
            want = [float64(x) for x in reference.dequantize(packed, mx.float32)]
    worst, name = 0.0, str(dtype).removeprefix("mlx.core.")
    for side, rows, expected in zip("KV", got, want):
        error = float(np.abs(float64(rows) - expected).max() / np.abs(expected).max())
        if not error <= ROWS[name]:
            raise CheckError(f"{side} rows in {name} differ by {error:.1e} of the largest value")
        worst = max(worst, error)
    return worst


def _check_many_queries(case: Case, backend: Backend, packed: AnyKV) -> None:
    limit = THROUGH_ROWS[case.variant.dtype]
    error, _ = _attention_error(case, backend, packed, 2, MANY_QUERIES, "causal")
    if not error <= limit:
        raise CheckError(
            f"attention of {MANY_QUERIES} queries over the rows: relative error {error:.1e} is "
            f"above {limit:.0e}"
        )


CHECKS = {
    "pack": check_pack, "decode": check_decode, "protected": check_protected,
    "dequantize": check_dequantize, "segments": check_segments,
}  # fmt: skip
JOBS = tuple(CHECKS)


def _attention_error(
    case: Case,
    backend: Backend,
    packed: AnyKV,
    gqa: int,
    n_queries: int,
    edge: str,
    splits: int | None = None,
) -> tuple[float, float]:
    """Relative error of attention over packed rows; ``edge`` as in ``Variant``.

    Returns: also the error as a part of what is allowed. A kernel's may be larger than that of
        ATTENTION where each row is within error_bound.py's bound: where its values cancel.
    """
    n, dim = packed.n_tokens, case.variant.k_head_dim
    scale, is_reference = dim**-0.5, backend.name == "reference"
    queries = case.normal(1, N_KV_HEADS * gqa, n_queries, dim)
    sinks = case.normal(N_KV_HEADS * gqa) if edge == "sinks" else None
    mask = seen = padding = None
    with mx.stream(mx.cpu):
        positions = mx.arange(n)
        if edge == "causal":
            mask, seen = "causal", positions <= mx.arange(n - n_queries, n)[:, None]
        elif edge == "starts":
            padding = mx.array([n // 3], mx.int32)
            seen = mx.broadcast_to(positions >= n // 3, (n_queries, n))
            if isinstance(packed, PackedKV) and packed.centre is not None:
                packed = packed._replace(left_padding=padding)
        if seen is not None:
            mx.eval(seen)
    if is_reference and seen is not None and edge == "starts":
        mask, padding = seen[None, None], None
    if splits:
        output = decode.decode(queries, packed, scale, backend=backend.name, splits=splits)
    else:
        output = dispatch.attention(queries, packed, scale, mask, sinks, padding, backend=backend)
    mx.eval(output)
    if is_reference:
        want = oracle.attention(queries, packed, scale, seen, sinks)
        error = _relative(output, want)
        return error, error / ATTENTION[case.variant.dtype]
    visible = np.broadcast_to(True if seen is None else np.array(seen), (n_queries, n))
    truth = error_bound.attention(queries, packed, scale, visible[None, None], sinks)
    error = _relative(output, truth.output)
    return error, min(error / ATTENTION[case.variant.dtype], truth.ratio(output))


def _relative(output: mx.array, want: np.ndarray) -> float:
    error = float64(output) - want
    return float(np.linalg.norm(error) / (np.linalg.norm(want) or 1.0))
