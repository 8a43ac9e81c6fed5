"""Lloyd-Max codebooks for one coordinate of a random unit vector.

After a random rotation the coordinates of a vector in d dimensions have the density
proportional to (1 - x**2)**((d - 3) / 2) (arXiv 2504.19874, lemma 1). The tables here are that
density's optimal scalar quantisers, iterated until convergence, and scaled by sqrt(d) so that
a coordinate has unit variance.
"""

from __future__ import annotations

from functools import cache

import numpy as np

_CELLS = 1 << 15
_CONVERGED = 1e-10
_MAX_ITERATIONS = 20_000


@cache
def codebook(bits: int, width: int) -> np.ndarray:
    """The optimal quantisation levels, ascending and symmetric.

    Args:
        bits: bits of a code, 1 to 8.
        width: dimensions of the vector that shares one scale, at least 4.

    Shapes:
        returns: [2**bits] float32, read-only.

    Raises:
        ValueError: the iteration did not converge.
    """
    levels = _lloyd_max(bits, width).astype(np.float32)
    levels.flags.writeable = False
    return levels


@cache
def boundaries(bits: int, width: int) -> np.ndarray:
    """Decision boundaries: the midpoints between neighbouring levels.

    Shapes:
        returns: [2**bits - 1] float32, read-only.
    """
    levels = codebook(bits, width).astype(np.float64)
    middle = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    middle.flags.writeable = False
    return middle


def _half_density(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cell edges on [0, sqrt(d)] and, up to each edge, the density's integral and first moment.

    The substitution x = sin(t) turns the density into cos(t)**(d - 2) dt, smooth for every d.
    """
    t = np.linspace(0, np.pi / 2, _CELLS + 1)
    fine = (t[:-1] + t[1:]) / 2
    density = np.cos(t) ** (width - 2)
    middle = np.cos(fine) ** (width - 2)
    step = t[1]
    mass = step / 6 * (density[:-1] + 4 * middle + density[1:])
    x = np.sqrt(width) * np.sin(t)
    # the first moment has a closed form: the integral of sin(t) cos(t)**n
    moment = np.sqrt(width) * (1 - np.cos(t) ** (width - 1)) / (width - 1)
    return x, np.concatenate([[0], np.cumsum(mass)]), moment


def _lloyd_max(bits: int, width: int) -> np.ndarray:
    """Lloyd's iteration over the positive half, which by symmetry determines the other."""
    x, mass, moment = _half_density(width)
    half = 1 << (bits - 1)
    quantiles = (np.arange(half) + 0.5) / half * mass[-1]
    levels = np.interp(quantiles, mass, x)
    for _ in range(_MAX_ITERATIONS):
        edges = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [x[-1]]])
        mass_at, moment_at = np.interp(edges, x, mass), np.interp(edges, x, moment)
        updated = np.diff(moment_at) / np.diff(mass_at)
        moved = np.abs(updated - levels).max()
        levels = updated
        if moved < _CONVERGED:
            return np.concatenate([-levels[::-1], levels])
    raise ValueError(f"the {bits}-bit codebook for {width} dimensions did not converge")
