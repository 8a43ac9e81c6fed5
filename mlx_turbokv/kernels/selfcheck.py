"""Runs a kernel on a small fixed input and compares every element with the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..quant.layout import TILE
from ..quant.quantize import FP16_MAX
from ..quant.tiles import code_bits, first_rows_mask, tiles_to_rows
from . import decode, dequantize, pack, reference, small_inputs, small_segments
from .agreement import CheckError, codes_and_scales, compare_rows
from .segment_rows import segment_rows
from .segments import AnyKV, Rows
from .small_inputs import N_KV_HEADS, between_nan
from .trust import Kernel

N_KEPT, N_NEW = 5, 40  # rows that pack finds in the tail, and packs
N_SPLITS = 2
HEADS, ALL_HEADS = (1, N_KV_HEADS - 1), (0, N_KV_HEADS)  # that rows are read of
BEYOND_HALF = 3e5
N_FRESH = 40  # rows that are not packed yet
# codes that may differ by one level, where a value lies at a decision boundary
CODES_SHARE = 5e-3
# an element's error over the largest value of its output row
ATTENTION = {"float16": 6e-3, "bfloat16": 1.5e-2, "float32": 1e-4}
# the same where scores are so low that half holds them in steps of an eighth
LOW_ATTENTION = {"float16": 0.5, "bfloat16": 0.5, "float32": 1e-2}
# a value's error over the largest one of its row
ROWS = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5}
# magnitudes of the rows that pack gets after ordinary ones
EXTREMES = {"float16": (0, 1e-6, 6e4), "bfloat16": (0, 1e-6, 1e20), "float32": (0, 1e-6, 1e20)}
MESSAGE_LENGTH = 200


def problem(kernel: Kernel) -> str | None:
    """What is wrong with a kernel, as the end of a sentence; None: it agrees."""
    try:
        CHECKS[kernel.op](kernel)
    except CheckError as error:
        return f"differs from the reference: {error}."
    except Exception as error:  # what MLX raises on a text that does not compile, or cannot run
        lines = str(error).strip().splitlines() or [type(error).__name__]
        line = next((line for line in lines if "error" in line), lines[0])
        return f"does not compile or run: {line.strip()[:MESSAGE_LENGTH].rstrip('.')}."
    return None


def _check_pack(kernel: Kernel) -> None:
    """Append rows to a tail that has stale rows behind those that are kept."""
    layout, n = kernel.layout, N_KEPT + N_NEW
    with mx.stream(mx.cpu):
        centre = small_inputs.centre_of(layout, kernel.centred)
        keys, values = (
            small_inputs.as_array(
                small_inputs.with_magnitudes(side, EXTREMES[_name(kernel.dtype)]), kernel.dtype
            )
            for side in small_inputs.rows(layout, n, centre)
        )
        options: dict[str, Any] = {"rotated": True} if kernel.rotated else {}
        if centre is not None:
            padding = between_nan(small_inputs.left_padding(3))
            options = {"centre": centre, "left_padding": padding}
        kept = reference.pack(keys[:, :, :N_KEPT], values[:, :, :N_KEPT], layout, **options)
        want = reference.pack(keys, values, layout, **options)
        new = between_nan(keys[:, :, N_KEPT:]), between_nan(values[:, :, N_KEPT:])
        tail = between_nan(small_inputs.stale_after(kept, layout, N_KEPT))
        mx.eval(want, new, tail)
    if centre is not None:
        options["first"] = N_KEPT
    got = pack.pack(*new, layout, tail, N_KEPT, **options, backend=kernel.backend)
    mx.eval(got)
    with mx.stream(mx.cpu):
        if got.shape != want.shape:
            raise CheckError(f"its output is {got.shape} instead of {want.shape}")
        if (got[:, :, -1] & ~first_rows_mask(layout, n % TILE)).any().item():
            raise CheckError("it leaves rows behind the last that are not zero")
        sides = tiles_to_rows(got, layout), tiles_to_rows(want, layout)
        mx.eval(sides)
    for side, fmt in (("k", layout.k_format), ("v", layout.v_format)):
        bits = code_bits(fmt, layout.itemsize)
        found, wanted = [codes_and_scales(rows, side, bits, n) for rows in sides]
        compare_rows(side.upper(), fmt, *found, *wanted, accepted=CODES_SHARE)


def _check_decode(kernel: Kernel) -> None:
    """Attention of queries that each look for one token, three times.

    Plain; with causal queries, sinks and left padding; with scores so low that a largest score
    that is not the tokens' own loses them.
    """
    name = _name(kernel.dtype)
    _compare_decode(kernel, ATTENTION[name])
    _compare_decode(kernel, ATTENTION[name], edges=True)
    _compare_decode(kernel, LOW_ATTENTION[name], low=True)


def _compare_decode(
    kernel: Kernel, accepted: float, edges: bool = False, low: bool = False
) -> None:
    gqa_factor, n_queries = kernel.heads
    n_heads, scale = gqa_factor * N_KV_HEADS, kernel.layout.k_head_dim**-0.5
    causal = edges and n_queries > 1
    sinks = padding = None
    with mx.stream(mx.cpu):
        if edges:
            padding = between_nan(small_inputs.left_padding(*small_inputs.PADDING))
            sinks = small_inputs.normal(7, (n_heads,), kernel.dtype) + small_inputs.SINK
            sinks = between_nan(sinks, n_heads)
        options = kernel.layout, kernel.centred, edges, low
        packed: AnyKV
        if kernel.protected is None:
            keys, packed = small_inputs.packed(*options)
            walled: AnyKV = small_inputs.walled(packed)
        else:
            keys, packed = small_segments.segmented(*options, kernel.protected)
            walled = small_segments.walled(packed)
        queries = between_nan(small_inputs.seeking(keys, kernel, low))
        exact = None if sinks is None else sinks.astype(mx.float32)
        mask = "causal" if causal else None
        want = reference.attention(
            queries.astype(mx.float32), packed, scale, mask, exact, padding
        )  # fmt: skip
        mx.eval(want, queries)
    got = decode.decode(
        queries, walled, scale, causal, sinks, padding, backend=kernel.backend,
        **_decode_options(kernel),
    )  # fmt: skip
    mx.eval(got)
    _compare(got, want, accepted, "attention")


def _decode_options(kernel: Kernel) -> dict[str, Any]:
    """What makes decode launch this kernel and no other."""
    options: dict[str, Any] = {"splits": 1 if kernel.whole else N_SPLITS}
    if kernel.cut is not None:
        options["cut"] = replace(kernel.cut, whole_rows=10**6 if kernel.rows == 1 else 0)
    return options


def _check_dequantize(kernel: Kernel) -> None:
    """Read rows back from body and tail, all KV heads but the first."""
    with mx.stream(mx.cpu):
        _, packed = small_inputs.packed(kernel.layout, kernel.centred, kernel.centred)
        want = reference.rotated_rows(packed, mx.float32, *HEADS)
        walled = small_inputs.walled(packed)
        mx.eval(want)
    _compare_rows(dequantize.rotated_rows(walled, kernel.dtype, *HEADS, kernel.backend), want)


def _check_segments(kernel: Kernel) -> None:
    """Read rows of three segments and some that are not packed, one of them beyond half."""
    layout = kernel.layout
    with mx.stream(mx.cpu):
        options = layout, kernel.centred, True, False, bool(kernel.protected)
        _, packed = small_segments.segmented(*options)
        sides = small_inputs.rows(layout, N_FRESH, packed.centre)
        if kernel.fresh != mx.float16:
            sides = [small_inputs.with_magnitudes(x, (BEYOND_HALF,)) for x in sides]
        keys, values = (small_inputs.as_array(x, kernel.fresh or kernel.dtype) for x in sides)
        want = reference.rotated_rows(packed._replace(fresh=(keys, values)), mx.float32, *ALL_HEADS)
        if kernel.dtype == mx.float16:
            want = mx.clip(want[0], -FP16_MAX, FP16_MAX), mx.clip(want[1], -FP16_MAX, FP16_MAX)
        walled = small_segments.walled(packed)
        walled = walled._replace(fresh=(between_nan(keys), between_nan(values)))
        mx.eval(want)
    _compare_rows(segment_rows(walled, kernel.dtype, ALL_HEADS, kernel.backend), want)


def _compare_rows(got: Rows, want: Rows) -> None:
    mx.eval(got)
    for side, rows, wanted in zip("KV", got, want):
        _compare(rows, wanted, ROWS[_name(rows.dtype)], f"{side} rows")


CHECKS = {
    "pack": _check_pack, "decode": _check_decode, "dequantize": _check_dequantize,
    "segments": _check_segments,
}  # fmt: skip


def _compare(got: mx.array, want: mx.array, accepted: float, what: str) -> None:
    """Compare every element.

    Raises:
        CheckError: one is further off than accepted, or not finite.
    """
    with mx.stream(mx.cpu):
        a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (got, want))
    if a.shape != b.shape:
        raise CheckError(f"{what} has shape {a.shape} instead of {b.shape}")
    if wrong := (~np.isfinite(a)).sum():
        raise CheckError(f"{what} is not finite in {wrong} of {a.size} values")
    largest = np.abs(b).max(axis=-1, keepdims=True)
    off = (np.abs(a - b) / np.maximum(largest, 1e-6)).max()
    if off > accepted:
        raise CheckError(f"{what} is off by {off:.1e} of the largest value, {accepted:g} accepted")


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
