"""Attention of prompts as on a GPU, without one: dequantised rows, and calls that wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_turbokv.attention.pacing import limit_in_flight
from mlx_turbokv.cache import rows
from mlx_turbokv.kernels import backend, reference


def _decode(queries, packed, scale, causal=False, *options):
    mask = "causal" if causal else None
    return reference.attention(queries, packed, scale, mask, *options)


WITH_KERNELS = backend.REFERENCE._replace(decode=_decode, rotated_rows=reference.rotated_rows)


@contextmanager
def paced() -> Iterator[None]:
    """Caches use plain ops where kernels would run; no call is too small to wait."""
    before = rows.select_backend, limit_in_flight.least_bytes
    rows.select_backend = lambda *_: WITH_KERNELS
    limit_in_flight.least_bytes = 0
    try:
        yield
    finally:
        rows.select_backend, limit_in_flight.least_bytes = before
