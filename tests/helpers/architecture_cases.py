"""What tests over all architectures of mlx-lm share."""

from __future__ import annotations

import mlx.core as mx

# muse_spark calls seven kernels that mlx-lm has for Metal and CUDA alone
NEEDS_A_GPU = set() if mx.default_device() == mx.gpu else {"muse_spark"}

# Root mean square of the logits' error over their standard deviation, through random weights.
# The simulation differs from the packed cache in the order of additions alone, and on a GPU in
# what its matrix units round.
SIMULATION_TOLERANCE = 1e-5 if mx.default_device() == mx.cpu else 3e-3
Q8_TOLERANCE = 0.03
TURBO4_TOLERANCE = 0.4


def put(caches: list, position: tuple[int, int | None], cache: object) -> None:
    index, sub = position
    if sub is None:
        caches[index] = cache
    else:
        entries = list(caches[index].caches)
        entries[sub] = cache
        caches[index].caches = tuple(entries)


def at(caches: list, position: tuple[int, int | None]) -> object:
    index, sub = position
    return caches[index] if sub is None else caches[index].caches[sub]
