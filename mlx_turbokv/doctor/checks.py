"""Checks pack, decode and dequantize of one variant against a reference.

A GPU back-end is compared with the reference ops, which run on the CPU; the reference back-end is
compared with float64 NumPy. Decode and dequantize read rows that the reference packed, so a
broken pack kernel fails alone.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..attention import dispatch
from ..centring.centre import Centre
from ..centring.rope import RopeFrequencies
from ..kernels import decode, dequantize, reference
from ..kernels.backend import Backend
from ..kernels.packed import PackedKV
from ..quant.layout import TILE
from ..quant.rotate import rotate
from ..quant.tiles import code_bits, first_rows_mask, tiles_to_rows
from . import oracle
from .tolerances import ATTENTION, MANY_QUERIES, ROWS, THROUGH_ROWS, CheckError, compare_rows
from .variants import Variant

N_KV_HEADS = 2
N_BODY, N_TAIL, N_KEPT = 64, 37, 5
N_SPLITS = 3
JOBS = ("pack", "decode", "dequantize")


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
    case = _Case(variant)
    for job in JOBS:
        if job in skip:
            continue
        yield job, None
        start = time.perf_counter()
        try:
            error, message = getattr(case, job)(backend), None
        except CheckError as failure:
            error, message = math.nan, str(failure)
        except Exception as failure:  # what MLX raises on a text that does not compile
            error, message = math.nan, f"{type(failure).__name__}: {failure}"
        yield job, Outcome(job, error, message, time.perf_counter() - start)


class _Case:
    """Inputs of a variant, the same on every machine, and its three checks."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self.layout = variant, variant.layout
        self.dtype = getattr(mx, variant.dtype)
        self.rng = np.random.default_rng(zlib.crc32(repr(variant).encode()))
        n = N_BODY + N_TAIL
        self.keys = self._rows(n, variant.k_head_dim)
        self.values = self._rows(n, variant.v_head_dim)
        self.centre: Centre | None = None
        if variant.centred:
            self._centre(n)

    def _rows(self, n: int, dim: int) -> mx.array:
        """Rows of different magnitudes, one of them zero."""
        rows = self.rng.standard_normal((1, N_KV_HEADS, n, dim))
        rows *= np.exp(self.rng.standard_normal((1, N_KV_HEADS, n, 1)))
        rows[:, :, 3] = 0
        return mx.array(rows.astype(np.float32)).astype(self.dtype)

    def _centre(self, n: int) -> None:
        """Add a constant part to the keys, larger than what varies."""
        dim = self.variant.k_head_dim
        mu = 4 * self.rng.standard_normal((N_KV_HEADS, dim)).astype(np.float32)
        self.centre = Centre(
            mx.array(mu), RopeFrequencies.from_arguments(dim, dim, False, 1e4), "doctor", 1, True
        )
        with mx.stream(mx.cpu):
            anchors = self.centre.rows(0, n)
            self.keys = (self.keys + anchors).astype(self.dtype)
            mx.eval(self.keys)

    def _at(self, first: int) -> dict:
        """Arguments of pack for the centre of rows from ``first`` on."""
        if self.centre is None:
            return {}
        return {"centre": self.centre, "first": first}

    def packed(self) -> PackedKV:
        """A body and a tail that the reference packed."""
        with mx.stream(mx.cpu):
            k, v, layout = self.keys, self.values, self.layout
            body = reference.pack(k[:, :, :N_BODY], v[:, :, :N_BODY], layout, **self._at(0))
            tail = reference.pack(k[:, :, N_BODY:], v[:, :, N_BODY:], layout, **self._at(N_BODY))
            mx.eval(body, tail)
        return PackedKV(self.layout, body, N_BODY, tail, N_TAIL, self.centre)

    def pack(self, backend: Backend) -> float:
        """Append rows to a tail; returns the share of codes that differ."""
        layout, n = self.layout, N_BODY + N_TAIL
        with mx.stream(mx.cpu):
            kept = self.keys[:, :, :N_KEPT], self.values[:, :, :N_KEPT]
            tail = reference.pack(*kept, layout, **self._at(0))
            mx.eval(tail)
        new = self.keys[:, :, N_KEPT:], self.values[:, :, N_KEPT:]
        tiles = backend.pack(*new, layout, tail, N_KEPT, **self._at(N_KEPT))
        mx.eval(tiles)
        with mx.stream(mx.cpu):
            rows = tiles_to_rows(tiles, layout)
            free = tiles[:, :, -1] & ~first_rows_mask(layout, n % TILE)
            if free.any().item():
                raise CheckError("rows behind the last are not zero")
            want = reference.pack(self.keys, self.values, layout, **self._at(0))
            keys = self.keys
            if self.centre is not None:
                keys = keys.astype(mx.float32) - self.centre.rows(0, n)
            if want.shape != tiles.shape:
                raise CheckError(f"shape {tiles.shape} instead of {want.shape}")
            wanted = tiles_to_rows(want, layout)
            mx.eval(rows, wanted, keys)
        share = 0.0
        for side, fmt, x in (("k", layout.k_format, keys), ("v", layout.v_format, self.values)):
            bits = code_bits(fmt, layout.itemsize)
            codes = oracle.codes_from_units(getattr(rows, side)[:, :, :n], bits)
            scales = getattr(rows, f"{side}_scales")[:, :, :n]
            if backend.name == "reference" and not fmt.is_f16:
                expected = oracle.quantized(_float64(x), fmt)
            else:
                units, theirs = getattr(wanted, side)[:, :, :n], getattr(wanted, f"{side}_scales")
                expected = oracle.codes_from_units(units, bits), np.array(theirs[:, :, :n])
            share = max(share, compare_rows(side.upper(), fmt, codes, np.array(scales), *expected))
        return share

    def decode(self, backend: Backend) -> float:
        """One query with a GQA factor of 4, unsplit and split; then the variant's own shape."""
        packed, v = self.packed(), self.variant
        worst = 0.0
        shapes = [(4, 1, "plain", None), (v.gqa_factor, v.n_queries, v.edge, None)]
        if backend.name != "reference":
            shapes.insert(1, (4, 1, "plain", N_SPLITS))
        for gqa, n_queries, edge, splits in shapes:
            error = self._attention_error(backend, packed, gqa, n_queries, edge, splits)
            if not error <= ATTENTION[v.dtype]:
                raise CheckError(
                    f"relative error {error:.1e} is above {ATTENTION[v.dtype]:.0e} "
                    f"(GQA factor {gqa}, {n_queries} queries, {edge}"
                    + (f", {splits} splits)" if splits else ")")
                )
            worst = max(worst, error)
        return worst

    def _attention_error(
        self,
        backend: Backend,
        packed: PackedKV,
        gqa: int,
        n_queries: int,
        edge: str,
        splits: int | None = None,
    ) -> float:
        n_heads, n, dim = N_KV_HEADS * gqa, packed.n_tokens, self.variant.k_head_dim
        shape = (1, n_heads, n_queries, dim)
        queries = mx.array(self.rng.standard_normal(shape).astype(np.float32)).astype(self.dtype)
        scale, sinks, options = dim**-0.5, None, {}
        mask = seen = None
        if edge == "causal":
            mask = "causal"
            seen = np.arange(n) <= np.arange(n - n_queries, n)[:, None]
        if edge == "sinks":
            logits = self.rng.standard_normal(n_heads).astype(np.float32)
            sinks = mx.array(logits).astype(self.dtype)
        if edge == "starts":
            if packed.centre is not None:
                packed = packed._replace(left_padding=mx.array([n // 3], mx.int32))
            seen = np.arange(n) >= n // 3
            if backend.name == "reference":
                mask = mx.array(np.broadcast_to(seen, (1, 1, n_queries, n)))
            else:
                options["left_padding"] = mx.array([n // 3], mx.int32)
        if splits:
            output = decode.decode(queries, packed, scale, backend=backend.name, splits=splits)
        else:
            output = dispatch.attention(
                queries, packed, scale, mask, sinks, **options, backend=backend
            )
        mx.eval(output)
        if backend.name == "reference":
            keys, values = (np.repeat(x, gqa, axis=1) for x in _expected_rows(packed))
            seen = np.ones((n_queries, n), bool) if seen is None else seen
            sink = None if sinks is None else _float64(sinks)
            want = oracle.attention(_float64(queries), keys, values, scale, seen, sink)
        else:
            if seen is not None:
                seen = mx.array(np.broadcast_to(seen, (1, 1, n_queries, n)))
            with mx.stream(mx.cpu):
                q = queries.astype(mx.float32)
                want = _float64(reference.attention(q, packed, scale, seen, sinks))
        error = _float64(output) - want
        return float(np.linalg.norm(error) / (np.linalg.norm(want) or 1.0))

    def dequantize(self, backend: Backend) -> float:
        """Read rows back; a kernel's rows are rotated back on the CPU, in float32."""
        packed = self.packed()
        if backend.name == "reference":
            got, want = backend.dequantize(packed, mx.float32), _expected_rows(packed)
        else:
            got = list(dequantize.rotated_rows(packed, mx.float32, 0, N_KV_HEADS, backend.name))
            mx.eval(got)
            formats = self.layout.k_format, self.layout.v_format
            with mx.stream(mx.cpu):
                for i, fmt in enumerate(formats):
                    if fmt.is_turbo:
                        got[i] = rotate(got[i], got[i].shape[-1], inverse=True)
                want = [_float64(x) for x in reference.dequantize(packed, mx.float32)]
        worst = 0.0
        for side, rows, expected in zip("KV", got, want):
            error = np.abs(_float64(rows) - expected).max() / np.abs(expected).max()
            if not error <= ROWS:
                raise CheckError(f"{side} rows differ by {error:.1e} of the largest value")
            worst = max(worst, float(error))
        error = self._attention_error(backend, packed, 2, MANY_QUERIES, "causal")
        if not error <= THROUGH_ROWS[self.variant.dtype]:
            raise CheckError(
                f"attention of {MANY_QUERIES} queries over the rows: relative error {error:.1e} is "
                f"above {THROUGH_ROWS[self.variant.dtype]:.0e}"
            )
        return worst


def timed(call: Callable[[], object], calls: int = 8, rounds: int = 5) -> float:
    """Median seconds of one call, of several rounds of calls that are evaluated together."""
    mx.eval(call())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval([call() for _ in range(calls)])
        seconds.append((time.perf_counter() - start) / calls)
    return sorted(seconds)[rounds // 2]


def _expected_rows(packed: PackedKV) -> list[np.ndarray]:
    """K and V of packed rows by NumPy alone, from their codes and scales."""
    layout = packed.layout
    with mx.stream(mx.cpu):
        parts = [tiles_to_rows(tiles, layout) for tiles in (packed.body, packed.tail)]
        mx.eval(parts)
    found = []
    for side, fmt in (("k", layout.k_format), ("v", layout.v_format)):
        rows = []
        for part, n in zip(parts, (packed.n_body, packed.n_tail)):
            units, scales = getattr(part, side)[:, :, :n], getattr(part, f"{side}_scales")[:, :, :n]
            if fmt.is_f16:
                with mx.stream(mx.cpu):
                    rows.append(_float64(units.view(getattr(mx, layout.dtype))))
            else:
                codes = oracle.codes_from_units(units, fmt.bits)
                rows.append(oracle.dequantized(codes, np.array(scales), fmt))
        found.append(np.concatenate(rows, axis=2))
    if packed.centre is not None:
        with mx.stream(mx.cpu):
            found[0] = found[0] + _float64(
                packed.centre.rows(0, packed.n_tokens, packed.left_padding)
            )
    return found


def _float64(x: mx.array) -> np.ndarray:
    with mx.stream(mx.cpu):
        return np.array(x.astype(mx.float32)).astype(np.float64)
