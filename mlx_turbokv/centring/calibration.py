"""References from a text: the mean key of each KV layer before RoPE, and scales of pairs of dims.

Of all constant vectors, the mean of the keys before RoPE leaves the least energy behind. Scales
(scales.py) weigh what it leaves of a pair with the energy of the queries. The first tokens of a
window are left out: they are attention sinks, and their keys are unlike all others.
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
from ..model.probing import kept_as_it_is, record_one_token
from .centre import lengths_left
from .queries import watched_queries
from .references import References
from .rope import OFFSET, RopeFrequencies, find_rope_frequencies
from .scales import PairScales

SINK_TOKENS = 4


def calibrate_keys(
    model: nn.Module,
    windows: np.ndarray,
    text_sha256: str = "",
    skip: int = SINK_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    scale: bool = False,
) -> References:
    """Mean keys of every KV layer whose RoPE frequencies are known.

    Args:
        model: a model of mlx-lm.
        windows: token ids, a forward pass each.
        text_sha256: of the text they come from; kept for the record.
        skip: first tokens of each window that are left out.
        progress: called with (windows done, all windows).
        scale: whether pairs of dims get scales, in layers whose queries
            ``mx.fast.scaled_dot_product_attention`` is given.

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
    layers, ropes, without = centrable_layers(model)
    found = {layer.ordinal: _Energies() for layer in layers}
    for done, window in enumerate(windows):
        caches = own_caches(model)
        held = [_cache_of(caches, layer) for layer in layers]
        queries: dict[int, mx.array] = {}
        with kept_as_it_is(model), watched_queries(held, queries.__setitem__):
            model(mx.array(window.astype(np.int32))[None], cache=caches)
        for i, layer in enumerate(layers):
            keys = held[i].keys[0, :, skip : len(window)].astype(mx.float32)
            keys = _before_rope(keys, ropes[layer.ordinal], skip)
            q = queries.get(i)
            found[layer.ordinal].add(keys, None if q is None else q[0, :, skip:])
        if progress:
            progress(done + 1, len(windows))
    n = len(windows) * (windows.shape[1] - skip)
    return References(
        {i: mx.array(x.mean.astype(np.float32)) for i, x in found.items()},
        without,
        fingerprint(model),
        {"text_sha256": text_sha256, "tokens": n, "skipped_first_tokens": skip},
        {i: s.of_pairs for i, x in found.items() if scale and (s := x.scales(ropes[i]))},
    )


def centrable_layers(
    model: nn.Module,
) -> tuple[list[KVLayer], dict[int, RopeFrequencies], frozenset[int]]:
    """KV layers whose keys have a mean before RoPE; little is computed.

    Returns:
        (the layers, their RoPE frequencies by ordinal, ordinals of those without RoPE).

    Raises:
        InputError: there is none.
    """
    layers = kv_layers(model).layers
    with_rope = find_rope_frequencies(model, layers)
    without = _without_rope(model, [x for x in layers if x.ordinal not in with_rope])
    ropes = {**with_rope, **without}
    if not ropes:
        raise InputError("No KV layer of this model has keys that can be centred.")
    return [x for x in layers if x.ordinal in ropes], ropes, frozenset(without)


class _Energies:
    """The mean of a layer's keys before RoPE, how far they are from it, and its queries' squares.

    Shapes:
        mean, deviations: [H, head_dim] float64, sums of squares of what differs from the mean.
        queries: the same, mean squares of all queries that read a KV head; None where some window
            had none.
    """

    def __init__(self) -> None:
        self.n = self.n_windows = 0
        self.mean: np.ndarray = np.zeros(())
        self.deviations: np.ndarray = np.zeros(())
        self.queries: np.ndarray | None = np.zeros(())

    def add(self, keys: mx.array, queries: mx.array | None) -> None:
        """Add a window's.

        Shapes:
            keys: [H, n, head_dim]; queries: [n_heads, n, head_dim].
        """
        n_heads, n, head_dim = keys.shape
        mean = keys.mean(axis=1)
        deviations = mx.square(keys - mean[:, None]).sum(axis=1)
        squares = None
        if queries is not None and queries.shape[0] % n_heads == 0:
            squares = mx.square(queries.astype(mx.float32)).mean(axis=1)
            squares = squares.reshape(n_heads, -1, head_dim).mean(axis=1)
        mean, deviations = np.array(mean, np.float64), np.array(deviations, np.float64)
        distance, total = mean - self.mean, self.n + n
        self.deviations = self.deviations + deviations + distance**2 * (self.n * n / total)
        self.mean = self.mean + distance * (n / total)
        self.n, self.n_windows = total, self.n_windows + 1
        if squares is None or self.queries is None:
            self.queries = None
        else:
            self.queries = self.queries + (np.array(squares) - self.queries) / self.n_windows

    def scales(self, rope: RopeFrequencies) -> PairScales | None:
        """The scales for keys that are centred by the mean; None without queries."""
        if self.queries is None:
            return None
        first, second = rope.pairs()
        left = np.zeros(rope.head_dim)
        left[first] = left[second] = 1 - lengths_left(rope) ** 2
        keys = self.deviations / self.n + left * self.mean**2
        return PairScales.from_energies(self.queries, keys, rope)


def _cache_of(caches: list[Any], layer: KVLayer) -> Any:
    cache = caches[layer.index]
    return cache if layer.sub is None else cache.caches[layer.sub]


def _before_rope(keys: mx.array, rope: RopeFrequencies, first: int) -> mx.array:
    """Keys as they were before RoPE.

    Shapes:
        keys: [H, n, head_dim], of positions first, first + 1, ...; returns the same.
    """
    positions = np.arange(first, first + keys.shape[1])[:, None]
    angles = positions * np.array(rope.angles, np.float64)
    cosine = mx.array(np.cos(angles).astype(np.float32))
    sine = mx.array(np.sin(angles).astype(np.float32))
    dims = rope.pairs()
    x, y = keys[..., mx.array(dims[0])], keys[..., mx.array(dims[1])]
    place = np.argsort(np.concatenate(dims))
    turned = mx.concatenate([x * cosine + y * sine, y * cosine - x * sine], axis=-1)
    return turned[..., mx.array(place)]


def _without_rope(model: nn.Module, layers: list[KVLayer]) -> dict[int, RopeFrequencies]:
    """Layers whose keys are the same at any position, as one token at two offsets shows."""
    if not layers:
        return {}
    ordinals = {(layer.index, layer.sub): layer.ordinal for layer in layers}
    first, second = (record_one_token(model, ordinals, offset) for offset in (0, OFFSET))
    return {
        ordinals[position]: RopeFrequencies.none(cache.keys.shape[-1])
        for position, cache in first.items()
        if position in second and mx.array_equal(cache.keys, second[position].keys).item()
    }
