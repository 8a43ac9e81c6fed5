"""Limits how many attention calls of a long prompt are in flight.

MLX submits the kernels of many layers before the first of them has run, and the dequantised rows
of all of them exist at once: gigabytes. Here a call is started as soon as it is built, and then
waits for what the layer before left in its cache, so that the GPU has the work of a layer or two.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import mlx.core as mx

LEAST_BYTES = 16 * 2**20


class InFlightLimit:
    """Starts an attention call when it is built, then waits for the layer before it.

    Args:
        least_bytes: calls that take fewer are left to MLX.
    """

    def __init__(self, least_bytes: int) -> None:
        self.least_bytes = least_bytes
        self._previous: weakref.ref | None = None

    def __call__(self, output: mx.array, held: Sequence[mx.array], n_bytes: int) -> None:
        """Start ``output``, which takes ``n_bytes``, and what the cache holds of the new rows.

        Args:
            held: arrays that live on in the cache; the next call waits for the last of them. What
                is not started keeps the new rows of all layers in memory.
        """
        if n_bytes < self.least_bytes:
            return
        try:
            mx.async_eval(output, *held)
        except ValueError:  # inside a transformation, where nothing can be computed
            return
        previous = self._previous and self._previous()
        self._previous = weakref.ref(held[-1])
        if previous is not None:
            mx.eval(previous)


limit_in_flight = InFlightLimit(LEAST_BYTES)
