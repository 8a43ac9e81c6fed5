"""What the paper's independent validation looks at: norms of keys by layer, and how much scores
suffer in boundary and middle layers as K gets fewer bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from paper_roles import K_BITS

WINDOWS = 4, 512  # and their tokens
N_EDGE = 2  # boundary layers at either end


def key_statistics(model: Any, windows: np.ndarray, group: str) -> dict:
    """Norms of keys by KV layer, and cosines of scores with quantised keys against the model's own.

    Scores are those of the queries of a window's second half, each with all keys before it, before
    the softmax; the cosine is of one query's scores. ``kurtosis`` is the excess of a key's rotated
    values: 0 is Gaussian, for which the codebooks are made.

    Shapes: windows [n, tokens]; norms, kurtosis and cosines by bits: [layers, n].
    """
    import mlx.core as mx

    from mlx_turbokv.centring.queries import watched_queries
    from mlx_turbokv.model.caches import cache_at, own_caches
    from mlx_turbokv.model.kv_layers import kv_layers

    layers, by_window = kv_layers(model).layers, []
    for window in windows:
        caches, queries = own_caches(model), {}
        held = [cache_at(caches, layer.index, layer.sub) for layer in layers]
        with watched_queries(held, queries.__setitem__):
            model(mx.array(window.astype(np.int32))[None], cache=caches)
        mx.eval([cache.state for cache in held], list(queries.values()))
        found = []
        for i, cache in enumerate(held):
            q = queries.get(i)
            found.append(_of_layer(cache.keys[0, :, : len(window)], None if q is None else q[0],
                                   group))  # fmt: skip
        by_window.append(found)
        mx.clear_cache()

    def gathered(key: Any) -> list[list[float | None]]:
        return [[found[i].get(key) for found in by_window] for i in range(len(layers))]

    return {
        "windows": len(windows), "tokens": int(windows.shape[1]), "group": group,
        "norms": gathered("norm"), "kurtosis": gathered("kurtosis"),
        "cosines": {str(bits): gathered(bits) for bits in K_BITS},
    }  # fmt: skip


def _of_layer(keys: Any, queries: Any, group: str) -> dict[Any, float]:
    """Figures of one layer in one window.

    Shapes: keys [H, n, D]; queries [n_heads, n, D] or None.
    """
    import mlx.core as mx

    from mlx_turbokv.quant.formats import as_format
    from mlx_turbokv.quant.quantize import quantize, values
    from mlx_turbokv.quant.rotate import rotate

    n_heads, n, head_dim = keys.shape
    keys = keys.astype(mx.float32)
    rotated = rotate(keys, head_dim)
    normal = rotated * mx.rsqrt(mx.square(rotated).mean(-1, keepdims=True))
    found: dict[Any, float] = {
        "norm": mx.linalg.norm(keys, axis=-1).mean().item(),
        "kurtosis": mx.power(normal, 4).mean().item() - 3,
    }
    if queries is None or queries.shape[0] % n_heads:
        return found
    q = rotate(queries[:, n // 2 :].astype(mx.float32), head_dim)
    q = q.reshape(n_heads, -1, head_dim)  # a KV head's queries, head after head
    n_queries = n - n // 2
    before = mx.arange(n)[None] <= mx.arange(n // 2, n)[:, None]
    before = mx.tile(before, (q.shape[1] // n_queries, 1))
    own = mx.where(before, q @ rotated.swapaxes(-1, -2), 0)
    for bits in K_BITS:
        fmt = as_format(f"turbo{bits}{group}")
        packed = values(*quantize(keys, fmt), fmt, head_dim, mx.float32)
        other = mx.where(before, q @ packed.swapaxes(-1, -2), 0)
        norms = mx.linalg.norm(own, axis=-1) * mx.linalg.norm(other, axis=-1)
        found[bits] = ((own * other).sum(-1) / norms).mean().item()
    return found


def split(values: list, n_edge: int = N_EDGE) -> tuple[np.ndarray, np.ndarray]:
    """Boundary layers' values and the middle ones', each [layers, windows]."""
    found = np.array(values, np.float64)
    edge = np.r_[0 : min(n_edge, len(found)), max(n_edge, len(found) - n_edge) : len(found)]
    return found[edge], np.delete(found, edge, axis=0)


def gaps(keys: dict) -> dict[int, np.ndarray]:
    """Boundary layers' cosine less the middle ones', by K's bits, a value a window."""
    found = {}
    for bits, values in keys["cosines"].items():
        edge, middle = split(values)
        if len(middle) and np.isfinite(edge).all() and np.isfinite(middle).all():
            found[int(bits)] = edge.mean(axis=0) - middle.mean(axis=0)
    return found
