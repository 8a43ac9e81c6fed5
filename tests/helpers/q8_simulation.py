"""mlx-lm's own caches over rows that went through q8_0 and back: an oracle for the packed ones.

Two right runs of a model add in other orders, and what lies half-way between two codes may be
rounded either way; the next layers then see another input. So the oracle is told what the packed
run stored, and takes that where it is as right as its own answer, up to TIE. Everywhere else it
decides for itself.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

# what two runs' rows may differ by: in steps between codes, and as a part of the scale
TIE = 1e-3
SCALE_TIE = 1e-5

Rows = tuple[mx.array, mx.array]


def note_stored(cache: KVCache) -> list[Rows]:
    """The list to which a packed cache adds the K and V that it stored, at each update."""
    stored: list[Rows] = []
    update = cache.update_and_fetch

    def noting(keys: mx.array, values: mx.array) -> Rows:
        fetched = update(keys, values)
        n = keys.shape[2]
        stored.append(tuple(x[:, :, -n:] for x in cache.keys_and_values(mx.float32)))
        mx.eval(stored[-1])
        return fetched

    cache.update_and_fetch = noting
    return stored


def through_q8(rows: mx.array, stored: mx.array | None = None) -> mx.array:
    """Rows quantised to q8_0 and back, in their dtype.

    Args:
        stored: what another run made of them; None where there is none.

    Shapes:
        rows, stored, returns: [..., head_dim].
    """
    groups = _groups(rows)
    seen = None if stored is None else _groups(stored)
    exact = mx.max(mx.abs(groups), -1, keepdims=True) / 127
    exact = mx.where(exact < 2.0**-14, mx.ceil(exact * 2.0**24) / 2.0**24, exact)  # upwards
    scale = exact.astype(mx.float16).astype(mx.float32)
    if seen is not None:  # the largest code is 127
        scale = _settled(
            exact, scale, mx.max(mx.abs(seen), -1, keepdims=True) / 127, SCALE_TIE * exact
        )
    step = mx.where(scale > 0, scale, mx.inf)
    back = mx.clip(mx.round(groups / step), -127, 127) * scale
    if seen is not None:
        back = _settled(groups, back, mx.round(seen / step) * scale, TIE * scale)
    return back.flatten(-2)[..., : rows.shape[-1]].astype(rows.dtype)


def _groups(rows: mx.array) -> mx.array:
    """[..., head_dim] to [..., groups, 32], float32, filled up with zeros."""
    rows = mx.pad(rows.astype(mx.float32), [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 32)])
    return mx.unflatten(rows, -1, (-1, 32))


def _settled(exact: mx.array, own: mx.array, seen: mx.array, tie: mx.array) -> mx.array:
    """``seen`` where it is as near to ``exact`` as ``own``, up to ``tie``; else ``own``."""
    return mx.where(mx.abs(exact - seen) <= mx.abs(exact - own) + tie, seen, own)


class _Simulated:
    """Rows through q8_0 before they are stored; ``stored`` is what a packed cache noted."""

    stored: list[Rows] | None = None
    n_updates = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Rows:
        seen = (None, None) if self.stored is None else self.stored[self.n_updates]
        self.n_updates += 1
        return super().update_and_fetch(through_q8(keys, seen[0]), through_q8(values, seen[1]))


class SimulatedQ8Cache(_Simulated, KVCache):
    """mlx-lm's growing cache."""

    def __init__(self, stored: list[Rows] | None = None) -> None:
        super().__init__()
        self.stored = stored


def simulated_like(own: object, stored: list[Rows]) -> object:
    """A new cache of the model's own class, with rows through q8_0."""
    cache = type("SimulatedOwnCache", (_Simulated, type(own)), {})()
    cache.stored = stored
    return cache


class SimulatedQ8RotatingCache(_Simulated, RotatingKVCache):
    """mlx-lm's cache of a window."""

    def __init__(self, max_size: int, keep: int = 0, stored: list[Rows] | None = None) -> None:
        super().__init__(max_size, keep)
        self.stored = stored
