"""What bench_kernels.py times of protected tokens: decode, and a prefill's step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import astuple

import mlx.core as mx
from kernel_variants import (
    Inputs,
    Variant,
    attention_error,
    copies,
    gqa_factor,
    mask_of,
    random_centre,
)
from mlx_lm.models.cache import KVCache

from mlx_turbokv import TurboKVCache
from mlx_turbokv.attention import dispatch, pacing
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.kernels import reference
from mlx_turbokv.kernels.backend import Backend
from mlx_turbokv.kernels.segments import SegmentedKV
from mlx_turbokv.policy.protection import DEFAULT_PROTECTION, UNPROTECTED

N_NEWEST = 16  # of the rows, generated one by one: a tail is partly filled at most steps


def cached_attention(pair: str, x: Inputs, backend: Backend, protected: bool) -> Variant:
    """Attention over a cache as generation leaves it, with protected tokens or none."""
    cache = _cache(pair, backend, protected)
    cache.update_and_fetch(*(side[:, :, :-N_NEWEST] for side in x[:2]))
    for i in range(-N_NEWEST, 0):
        cache.update_and_fetch(*(side[:, :, i:][:, :, :1] for side in x[:2]))
    found = cache.packed
    names = ("body", "tail", *(("sink",) if isinstance(found, SegmentedKV) else ()))
    parts = copies(*(getattr(found, name) for name in names))
    views = [found._replace(**dict(zip(names, part))) for part in parts]
    scale, mask = x.keys.shape[-1] ** -0.5, mask_of(x)

    def call(i: int, queries: mx.array) -> mx.array:
        return dispatch.attention(queries, views[i % len(views)], scale, mask, backend=backend)

    def check() -> tuple[float, float]:
        own = {name: getattr(views[0], name)[:, :1] for name in names}
        rows = reference.dequantize(views[0]._replace(**own), mx.float32)
        return attention_error(call(0, x.queries), x.queries, *rows, gqa_factor(x))

    n_bytes = sum(getattr(found, name).nbytes for name in names)
    return Variant(call, lambda: x.queries, n_bytes, check)


def _cache(
    pair: str, backend: Backend, protected: bool, centre: Centre | None = None
) -> TurboKVCache:
    protection = DEFAULT_PROTECTION if protected else UNPROTECTED
    return TurboKVCache(*pair.split("/"), backend.name, centre, *astuple(protection))


@contextmanager
def not_paced() -> Iterator[None]:
    """Attention does not wait for the call before it: the chain is timed when it is submitted."""
    limit = pacing.limit_in_flight
    least, limit.least_bytes = limit.least_bytes, sys.maxsize
    try:
        yield
    finally:
        limit.least_bytes = least


def prefill(pair: str, x: Inputs, backend: Backend, centred: bool, protected: bool) -> Variant:
    """A prefill's step of one layer: packs the newest rows, and attends to all of them.

    As many rows as there are queries are new.
    """
    n_new = x.queries.shape[2]
    old, new = ([s[:, :, part] for s in x[:2]] for part in (slice(0, -n_new), slice(-n_new, None)))
    centre = random_centre(x.keys.shape[1], x.keys.shape[-1]) if centred else None
    cache = _cache(pair, backend, protected, centre)
    cache.update_and_fetch(*old)
    mx.eval(cache.state)
    scale = x.keys.shape[-1] ** -0.5

    def call(i: int, queries: mx.array) -> mx.array:
        own = copy(cache)
        keys, values = own.update_and_fetch(*new)
        with not_paced():
            output = mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask="causal"
            )
        return mx.depends(output, own.state[4:6]) if own.state[5] is not None else output

    n_bytes = cache.nbytes + sum(side.nbytes for side in new)
    return Variant(call, lambda: x.queries, n_bytes)


def fp16_prefill(x: Inputs) -> Variant:
    """What mlx-lm's fp16 cache does in such a step."""
    n_new, scale = x.queries.shape[2], x.keys.shape[-1] ** -0.5

    def call(i: int, queries: mx.array) -> mx.array:
        cache = KVCache()
        cache.keys, cache.values = x.keys, x.values
        cache.offset = x.keys.shape[2] - n_new
        keys, values = cache.update_and_fetch(*(side[:, :, -n_new:] for side in x[:2]))
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask="causal"
        )

    return Variant(call, lambda: x.queries, x.keys.nbytes + x.values.nbytes)
