"""References from a text: the mean key of each KV layer before RoPE.

Of all constant vectors, the mean of the keys before RoPE leaves the least energy behind. The first
tokens of a window are left out: they are attention sinks, and their keys are unlike all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..model.caches import own_caches
from ..model.fingerprint import fingerprint
from ..model.kv_layers import KVLayer, kv_layers
from ..model.probing import record_one_token
from .references import References
from .rope import RopeFrequencies, find_rope_frequencies

SINK_TOKENS = 4


def calibrate_keys(
    model: nn.Module,
    windows: np.ndarray,
    text_sha256: str = "",
    skip: int = SINK_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> References:
    """Mean keys of every KV layer whose RoPE frequencies are known.

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
    with_rope = find_rope_frequencies(model, layers)
    without = _without_rope(model, [x for x in layers if x.ordinal not in with_rope])
    ropes = {**with_rope, **without}
    if not ropes:
        raise InputError("No KV layer of this model has keys that can be centred.")
    sums: dict[int, np.ndarray] = {}
    for done, window in enumerate(windows):
        caches = own_caches(model)
        model(mx.array(window.astype(np.int32))[None], cache=caches)
        for layer in layers:
            if layer.ordinal in ropes:
                keys = _held_keys(caches, layer, len(window))[..., skip:, :]
                total = _sum_before_rope(keys, ropes[layer.ordinal], skip)
                sums[layer.ordinal] = sums.get(layer.ordinal, 0) + np.array(total, np.float64)
        if progress:
            progress(done + 1, len(windows))
    n = len(windows) * (windows.shape[1] - skip)
    return References(
        {i: mx.array((total / n).astype(np.float32)) for i, total in sums.items()},
        frozenset(without),
        fingerprint(model),
        {"text_sha256": text_sha256, "tokens": n, "skipped_first_tokens": skip},
    )


def _held_keys(caches: list[Any], layer: KVLayer, n: int) -> mx.array:
    cache = caches[layer.index]
    cache = cache if layer.sub is None else cache.caches[layer.sub]
    return cache.keys[0, :, :n].astype(mx.float32)


def _sum_before_rope(keys: mx.array, rope: RopeFrequencies, first: int) -> mx.array:
    """The sum over tokens of the keys before RoPE.

    Shapes:
        keys: [H, n, head_dim], of positions first, first + 1, ...; returns: [H, head_dim].
    """
    positions = np.arange(first, first + keys.shape[1])[:, None]
    angles = positions * np.array(rope.angles, np.float64)
    cosine = mx.array(np.cos(angles).astype(np.float32))
    sine = mx.array(np.sin(angles).astype(np.float32))
    dims = rope.pairs()
    x, y = keys[..., mx.array(dims[0])], keys[..., mx.array(dims[1])]
    sums = [(x * cosine + y * sine).sum(axis=1), (y * cosine - x * sine).sum(axis=1)]
    place = np.argsort(np.concatenate(dims))
    return mx.concatenate(sums, axis=-1)[:, mx.array(place)]


def _without_rope(model: nn.Module, layers: list[KVLayer]) -> dict[int, RopeFrequencies]:
    """Layers whose keys are the same at any position, as one token at two offsets shows."""
    if not layers:
        return {}
    ordinals = {(layer.index, layer.sub): layer.ordinal for layer in layers}
    first, second = (record_one_token(model, ordinals, offset) for offset in (0, 1009))
    return {
        ordinals[position]: RopeFrequencies.none(cache.keys.shape[-1])
        for position, cache in first.items()
        if position in second and mx.array_equal(cache.keys, second[position].keys).item()
    }
