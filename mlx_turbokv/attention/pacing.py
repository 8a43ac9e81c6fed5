"""Keeps a long prompt from being begun far ahead of the GPU.

MLX hands the launches of many layers over before the first of them is done, and the dequantised
rows of all of them, with all else that a layer needs for a moment, exist at once: gigabytes. Where
attention waits for the layer before, they do not, and the GPU still has a layer's work left.
"""

from __future__ import annotations

import weakref

import mlx.core as mx

PACED_BYTES = 16 * 2**20


class Pace:
    """Begins an attention call when it is built, and waits for the one before it.

    Args:
        least_bytes: calls that take fewer are left to MLX.
    """

    def __init__(self, least_bytes: int) -> None:
        self.least_bytes = least_bytes
        self._before: weakref.ref | None = None

    def keep(self, output: mx.array, held: mx.array, n_bytes: int) -> None:
        """Begin ``output``, which takes ``n_bytes``; ``held`` is an array it needs that lives on."""
        if n_bytes < self.least_bytes:
            return
        try:
            mx.async_eval(output)
        except ValueError:  # inside a transformation, where nothing can be computed
            return
        before = self._before and self._before()
        self._before = weakref.ref(held)
        if before is not None:
            mx.eval(before)


pace = Pace(PACED_BYTES)
