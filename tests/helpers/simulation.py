"""What a packed cache must do to a model, restated in NumPy.

The oracle of the perplexity tests. `SimulatedCache` is mlx-lm's own `KVCache` whose rows were
quantised and dequantised in float64 before they were stored; attention is mlx-lm's. Nothing here
comes from the package: the codebooks are iterated from the density, the Hadamard matrix is
SciPy's, the signs are restated from their definition. What the two share is the definition of the
formats alone, so that agreement of their per-window losses says that the package stores what it
says it stores, and attends to it.
"""

from __future__ import annotations

import hashlib
from functools import cache

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from scipy.integrate import quad
from scipy.linalg import hadamard

SCALE_RULES = ("raw", "matched", "least_squares", "unbiased")


@cache
def lloyd_max(bits: int, width: int) -> np.ndarray:
    """Lloyd–Max levels of one coordinate of a random unit vector, times sqrt(width), ascending.

    Fixed-point iteration on the density (1 - x²)^((width - 3) / 2): each level becomes the mean
    of its cell, each boundary the midpoint of two levels.
    """

    def mass(x):
        return (1.0 - x * x) ** ((width - 3) / 2)

    half = 2 ** (bits - 1)
    spread = 3.0 / np.sqrt(width)
    levels = (np.arange(half) + 0.5) / half * spread
    # The moment ∫ x (1 - x²)^a dx has a closed form, only the mass needs quadrature: on a fine
    # grid once, so that iterating costs nothing.
    grid = np.linspace(0.0, 1.0, 200_001)
    steps = np.diff(grid)
    middle = mass((grid[1:] + grid[:-1]) / 2)
    density = mass(grid)
    simpson = steps / 6 * (density[1:] + density[:-1] + 4 * middle)
    cumulative = np.concatenate([[0.0], np.cumsum(simpson)])
    power = (width - 3) / 2 + 1

    def moment(a, b):
        return ((1 - a * a) ** power - (1 - b * b) ** power) / (2 * power)

    for _ in range(100_000):
        edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        weights = np.diff(np.interp(edges, grid, cumulative))
        updated = moment(edges[:-1], edges[1:]) / weights
        if np.max(np.abs(updated - levels)) < 1e-14:
            break
        levels = updated
    # One cell by adaptive quadrature: the grid must not have bent the answer.
    lowest = quad(lambda x: x * mass(x), 0, edges[1])[0] / quad(mass, 0, edges[1])[0]
    if abs(lowest - levels[0]) > 1e-6:
        raise ArithmeticError(f"codebook of {bits} bits at width {width} did not converge")
    return np.concatenate([-levels[::-1], levels]) * np.sqrt(width)


@cache
def rotation(width: int) -> np.ndarray:
    """The matrix R of y = R x: Sylvester–Hadamard times the fixed signs, orthonormal."""
    digest = hashlib.sha256(b"mlx_turbokv rotation signs").digest()
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), bitorder="little")
    signs = 1.0 - 2.0 * bits[:width]
    return hadamard(width) * signs[None, :] / np.sqrt(width)


class StoredCodes:
    """What the cache under test stored, used to settle near-ties (teacher-forced codes).

    Quantisation is chaotic: a code that tips over in one layer moves every later layer, and a
    relative change of 1e-6 in the embeddings moves a window's mean loss by 0.02 with turbo3 K. So
    two right implementations that round differently end far apart. Where a value lies within NEAR
    of the border between two codes, or a scale within NEAR_SCALE of the middle between two
    half-precision numbers, both answers are right: the simulation then takes the one that fits the
    stored rows better. Everywhere else it decides for itself; `asked / decided` is the share of
    near-ties.

    rows: what was stored, in the model's basis; None settles nothing.
    """

    NEAR = 1e-3  # of a step between codes, or of a group's deviation
    NEAR_SCALE = 2e-2  # of a step between half-precision numbers, which is 1e-3 of the scale

    def __init__(self, rows: np.ndarray | None = None):
        self.rows = rows
        self.asked = 0
        self.decided = 0

    def choose(self, distance, own, other, error_own, error_other, near=NEAR):
        """`own`, or `other` where `distance` from the border is small and it fits better."""
        self.decided += distance.size
        if self.rows is None:
            return own
        tie = distance < near
        self.asked += int(np.sum(tie))
        return np.where(tie & (error_other < error_own), other, own)

    def half(self, scale: np.ndarray, wanted: np.ndarray | None) -> np.ndarray:
        """scale in half precision; `wanted` is the scale that the stored rows seem to have."""
        rounded = scale.astype(np.float16)
        towards = np.where(scale >= rounded, np.inf, -np.inf).astype(np.float16)
        other = np.nextafter(rounded, towards).astype(np.float64)
        own = rounded.astype(np.float64)
        wanted = own if wanted is None else wanted
        distance = np.abs(np.abs(scale - own) / np.maximum(np.abs(other - own), 1e-30) - 0.5)
        errors = np.abs(own - wanted), np.abs(other - wanted)
        return self.choose(distance, own, other, *errors, near=self.NEAR_SCALE)


def simulate_q8_0(x: np.ndarray, stored: StoredCodes) -> np.ndarray:
    """x quantised to int8 with a half-precision scale per 32 values, and back.

    The scale is the largest magnitude over 127; codes count steps of the stored scale.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    seen = None if stored.rows is None else stored.rows.reshape(blocks.shape)
    exact = np.max(np.abs(blocks), axis=-1, keepdims=True) / 127
    exact = np.where(exact < 2.0**-14, np.ceil(exact * 2.0**24) / 2.0**24, exact)  # upwards
    # The largest code is 127 whichever way the scale was rounded.
    wanted = None if seen is None else np.max(np.abs(seen), axis=-1, keepdims=True) / 127
    d = stored.half(exact, wanted)
    steps = np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0)
    own = np.clip(np.rint(steps), -127, 127)
    other = own + np.where(steps >= own, 1, -1)
    seen = own * d if seen is None else seen
    errors = np.abs(own * d - seen), np.abs(other * d - seen)
    codes = stored.choose(np.abs(np.abs(steps - own) - 0.5), own, other, *errors)
    return (codes * d).reshape(x.shape)


def group_scale(y: np.ndarray, c: np.ndarray, rule: str) -> np.ndarray:
    """The scale that a group of rotated values y stores for its levels c (unit variance)."""
    yy = np.sum(y * y, axis=-1, keepdims=True)
    cc = np.sum(c * c, axis=-1, keepdims=True)
    yc = np.sum(y * c, axis=-1, keepdims=True)
    if rule == "raw":
        return np.sqrt(yy / y.shape[-1])
    if rule == "matched":
        return np.sqrt(yy / cc)
    if rule == "least_squares":
        return yc / cc
    if rule == "unbiased":
        return np.divide(yy, yc, out=np.zeros_like(yy), where=yc > 0)
    raise ValueError(f"scale rule {rule!r} is none of {SCALE_RULES}")


def simulate_turbo(
    x: np.ndarray, bits: int, rule: str, group: int | None, stored: StoredCodes
) -> np.ndarray:
    """x rotated, quantised to the nearest of 2**bits levels per group, and back."""
    head_dim = x.shape[-1]
    width = head_dim if head_dim <= 128 else 128
    group = group or width
    r = rotation(width)

    def rotated(rows):
        turned = rows.reshape(*rows.shape[:-1], -1, width) @ r.T
        return turned.reshape(*rows.shape[:-1], -1, group)

    y = rotated(x)
    table = lloyd_max(bits, group)
    edges = (table[1:] + table[:-1]) / 2
    rms = np.sqrt(np.mean(y * y, axis=-1, keepdims=True))
    unit = np.divide(y, rms, out=np.zeros_like(y), where=rms > 0)
    own = np.searchsorted(edges, unit)
    # The nearest border, and the code on its other side.
    walls = np.concatenate([[-np.inf], edges, [np.inf]])
    below, above = unit - walls[own], walls[own + 1] - unit
    other = np.where(above < below, own + 1, own - 1)
    seen = wanted = None
    fit = group_scale(y, table[own], rule)
    if stored.rows is not None:
        seen = rotated(stored.rows)
    # Levels lie far apart beside what the scale may be off, so any scale tells them apart.
    goal = fit * table[own] if seen is None else seen
    error_own, error_other = (np.abs(fit * table[c] - goal) for c in (own, other))
    c = table[stored.choose(np.minimum(below, above), own, other, error_own, error_other)]
    if seen is not None:
        wanted = np.sum(seen * c, axis=-1, keepdims=True) / np.sum(c * c, axis=-1, keepdims=True)
    scale = stored.half(group_scale(y, c, rule), wanted)
    back = (scale * c).reshape(*x.shape[:-1], -1, width) @ r
    return back.reshape(x.shape)


def simulate(x: np.ndarray, fmt: str, rule: str, stored: StoredCodes | None = None) -> np.ndarray:
    """x through the format named fmt ('f16', 'q8_0', 'turbo3', 'turbo3:32') and back."""
    stored = stored or StoredCodes()
    if fmt == "f16":
        return x
    if fmt == "q8_0":
        return simulate_q8_0(x, stored)
    name, _, group = fmt.partition(":")
    bits = int(name.removeprefix("turbo"))
    return simulate_turbo(x, bits, rule, int(group) if group else None, stored)


class SimulatedCache(KVCache):
    """mlx-lm's KVCache, holding what a packed cache returns to attention.

    stored: (keys, values) that the cache under test gives back, for ties only (`StoredCodes`).
    """

    def __init__(self, k: str, v: str, k_rule: str = "raw", v_rule: str = "raw", stored=None):
        super().__init__()
        self.formats, self.rules, self.stored = (k, v), (k_rule, v_rule), stored
        self.near_ties: list[StoredCodes] = []

    def update_and_fetch(self, keys, values):
        span = slice(self.offset, self.offset + keys.shape[2])
        through = []
        for side, x in enumerate((keys, values)):
            if self.formats[side] != "f16":
                seen = None if self.stored is None else _exact(self.stored[side][:, :, span])
                stored = StoredCodes(seen)
                found = simulate(_exact(x), self.formats[side], self.rules[side], stored)
                x = mx.array(found.astype(np.float32)).astype(x.dtype)
                self.near_ties.append(stored)
            through.append(x)
        return super().update_and_fetch(*through)


def share_asked(caches: list[SimulatedCache]) -> float:
    """Share of all decisions of these caches that the stored rows settled."""
    found = [w for c in caches for w in c.near_ties]
    return sum(w.asked for w in found) / max(sum(w.decided for w in found), 1)


def _exact(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def layer_formats(config: str, n_layers: int) -> list[tuple[str, str]]:
    """Formats of each layer for a configuration's name, restated from the published table."""
    boundary_v = {"la-v5": ("turbo4", 2), "la-v7": ("q8_0", 2), "mode-10": ("q8_0", 4)}
    if config in boundary_v:
        fmt, n = boundary_v[config]
        edge = [i < n or i >= n_layers - n for i in range(n_layers)]
        return [("q8_0", fmt if e else "turbo2") for e in edge]
    if config == "la-v6":
        return [("q8_0", "turbo4" if i >= n_layers - 8 else "turbo2") for i in range(n_layers)]
    k, v = config.split("/")
    return [(k, v)] * n_layers


def window_nll(model, window: list[int], caches: list) -> np.ndarray:
    """Losses of the second half of one window, as llama-perplexity scores them."""
    first = len(window) // 2
    logits = model(mx.array(window[:-1])[None], cache=caches)[0, first:].astype(mx.float32)
    targets = mx.array(window[first + 1 :])
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return np.array(mx.logsumexp(logits, axis=-1) - picked)
