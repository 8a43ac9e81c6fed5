"""References from a text: the mean key of each KV layer, RoPE undone.

Over all constant vectors, the mean of keys turned back leaves the least energy behind. The first
tokens of a window are left out: they are attention sinks, and their keys are unlike all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..model.kv_layers import KVLayer, kv_layers
from ..model.shapes import own_caches, put_cache
from .centre import Turning
from .probe import NotingCache, find_turnings
from .references import References, fingerprint

SINK_TOKENS = 4


def calibrate_keys(
    model: nn.Module,
    windows: np.ndarray,
    text_sha256: str = "",
    skip: int = SINK_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> References:
    """Mean keys of every KV layer whose positions are understood.

    Args:
        model: a model of mlx-lm.
        windows: token ids, a forward pass each.
        text_sha256: of the text they come from; kept for the record.
        skip: first tokens of each window that are left out.
        progress: called with (windows done, all windows).

    Shapes:
        windows: [n, tokens].

    Raises:
        InputError: no window, windows not longer than ``skip``, or no KV layer that can be
            centred.
    """
    windows = np.asarray(windows)
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] <= skip:
        raise InputError(
            f"Calibration windows of shape {windows.shape} are not accepted: at least one of more "
            f"than {skip} tokens is needed."
        )
    layers = kv_layers(model).layers
    turnings = find_turnings(model, layers)
    still = _unturned(model, [x for x in layers if x.ordinal not in turnings])
    all_turnings = {**turnings, **still}
    if not all_turnings:
        raise InputError("No KV layer of this model has keys that can be centred.")
    sums: dict[int, np.ndarray] = {}
    for done, window in enumerate(windows):
        caches = own_caches(model)
        model(mx.array(window.astype(np.int32))[None], cache=caches)
        for layer in layers:
            if layer.ordinal in all_turnings:
                keys = _held_keys(caches, layer, len(window))[..., skip:, :]
                total = _turned_back(keys, all_turnings[layer.ordinal], skip)
                sums[layer.ordinal] = sums.get(layer.ordinal, 0) + np.array(total, np.float64)
        if progress:
            progress(done + 1, len(windows))
    n = len(windows) * (windows.shape[1] - skip)
    return References(
        {i: mx.array((total / n).astype(np.float32)) for i, total in sums.items()},
        frozenset(still),
        fingerprint(model),
        {"text_sha256": text_sha256, "tokens": n, "skipped_first_tokens": skip},
    )


def _held_keys(caches: list[Any], layer: KVLayer, n: int) -> mx.array:
    cache = caches[layer.index]
    cache = cache if layer.sub is None else cache.caches[layer.sub]
    return cache.keys[0, :, :n].astype(mx.float32)


def _turned_back(keys: mx.array, turning: Turning, first: int) -> mx.array:
    """The sum over tokens of keys with the turning of their position undone.

    Shapes:
        keys: [H, n, head_dim], of positions first, first + 1, ...; returns: [H, head_dim].
    """
    positions = np.arange(first, first + keys.shape[1])[:, None]
    angles = positions * np.array(turning.angles, np.float64)
    cosine, sine = mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))  # fmt: skip
    dims = turning.pairs()
    x, y = keys[..., mx.array(dims[0])], keys[..., mx.array(dims[1])]
    back = [(x * cosine + y * sine).sum(axis=1), (y * cosine - x * sine).sum(axis=1)]
    place = np.argsort(np.concatenate(dims))
    return mx.concatenate(back, axis=-1)[:, mx.array(place)]


def _unturned(model: nn.Module, layers: list[KVLayer]) -> dict[int, Turning]:
    """Layers whose keys are the same at any position, as one token at two offsets shows."""
    if not layers:
        return {}
    handed = []
    for offset in (0, 1009):
        noting = {layer.ordinal: NotingCache(offset) for layer in layers}
        caches = own_caches(model)
        for layer in layers:
            put_cache(caches, layer.index, layer.sub, noting[layer.ordinal])
        try:
            model(mx.zeros((1, 1), mx.int32), cache=caches)
        except Exception:  # what a model needs beyond tokens is known to its own loader alone
            return {}
        handed.append({i: cache.handed for i, cache in noting.items()})
    found = {}
    for ordinal, keys in handed[0].items():
        others = handed[1][ordinal]
        if keys is not None and others is not None and mx.array_equal(keys, others).item():
            found[ordinal] = Turning.none(keys.shape[-1])
    return found
