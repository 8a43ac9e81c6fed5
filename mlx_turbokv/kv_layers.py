"""Finds the KV layers of any mlx-lm model, in order.

The model's own cache factory says what each layer keeps. A plain ``KVCache`` grows with the
context and is compressed; everything else is left alone, with a reason. The one thing a factory
does not tell is that absorbed multi-head latent attention (MLA) keeps latents in its ``KVCache``:
that is read off the attention modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

RECURRENT = "recurrent state"
LATENT = "MLA latent"
COMPOSITE = "several caches a layer, with keys of an indexer"


@dataclass(frozen=True)
class KVLayer:
    """A KV layer that can be compressed.

    Args:
        ordinal: position among the whole model's KV layers, what policies count.
        index: position in the cache list.
        sub: position inside a CacheList, or None.
    """

    ordinal: int
    index: int
    sub: int | None = None


@dataclass(frozen=True)
class Skipped:
    """A cache that is left as it is, and why."""

    index: int
    reason: str
    sub: int | None = None


@dataclass(frozen=True)
class KVLayers:
    """What ``kv_layers`` found.

    Args:
        layers: the KV layers of this process.
        skipped: the caches left alone.
        n_total: KV layers of the whole model; more than ``layers`` on a pipeline rank.
    """

    layers: list[KVLayer] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    n_total: int = 0

    def notes(self) -> list[str]:
        """One sentence for each reason why caches were left alone."""
        by_reason: dict[str, list[int]] = {}
        for entry in self.skipped:
            indices = by_reason.setdefault(entry.reason, [])
            if entry.index not in indices:
                indices.append(entry.index)
        return [
            f"Not compressed: layer{'s' * (len(indices) > 1)} {_ranges(indices)} ({reason})."
            for reason, indices in by_reason.items()
        ]


def kv_layers(model: nn.Module, caches: list[Any] | None = None) -> KVLayers:
    """Find the layers whose cache grows and can be compressed.

    Args:
        model: a model of mlx-lm.
        caches: what the model's own factory made (default: call it).
    """
    if caches is None:
        caches = own_caches(model)
    found = _classify(model, caches)
    stage = _pipeline_stage(model)
    if stage is None:
        return found
    whole = _classify(model_skeleton(model))
    before = sum(layer.index < stage.start_idx for layer in whole.layers)
    layers = [KVLayer(before + x.ordinal, x.index, x.sub) for x in found.layers]
    return KVLayers(layers, found.skipped, len(whole.layers))


def own_caches(model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    """Caches from the model's own factory, whatever is attached to the instance."""
    attached = vars(model).get("make_cache")
    while hasattr(attached, "turbokv_previous"):
        attached = attached.turbokv_previous
    if attached is not None:
        return attached(*args, **kwargs)
    if hasattr(type(model), "make_cache"):
        return type(model).make_cache(model, *args, **kwargs)
    return [KVCache() for _ in model.layers]


def model_skeleton(model: nn.Module) -> nn.Module:
    """A whole model of the same configuration; its weights are lazy and never computed."""
    args = getattr(model, "args", None) or getattr(model, "config", None)
    return type(model)(args)


def _classify(model: nn.Module, caches: list[Any] | None = None) -> KVLayers:
    caches = own_caches(model) if caches is None else caches
    latent = _latent_indices(model, len(caches))
    layers: list[KVLayer] = []
    skipped: list[Skipped] = []
    for index, cache in enumerate(caches):
        if isinstance(cache, CacheList) and _is_hybrid_list(cache):
            entries = [(sub, entry) for sub, entry in enumerate(cache.caches)]
        else:
            entries = [(None, cache)]
        for sub, entry in entries:
            reason = _why_not(entry, index in latent)
            if reason is None:
                layers.append(KVLayer(len(layers), index, sub))
            else:
                skipped.append(Skipped(index, reason, sub))
    return KVLayers(layers, skipped, len(layers))


def _is_hybrid_list(cache: CacheList) -> bool:
    """Whether the list is one recurrent and one attention cache of a parallel hybrid layer.

    Lists of KV caches alone belong to models that use them for other things than K and V.
    """
    return any(isinstance(entry, ArraysCache) for entry in cache.caches)


def _why_not(cache: Any, latent: bool) -> str | None:
    if type(cache) is KVCache:
        return LATENT if latent else None
    if isinstance(cache, ArraysCache):
        return RECURRENT
    if isinstance(cache, RotatingKVCache):
        return f"sliding window of {cache.max_size} tokens"
    if isinstance(cache, ChunkedKVCache):
        return f"chunked attention of {cache.chunk_size} tokens"
    if isinstance(cache, CacheList):
        return LATENT if latent else COMPOSITE
    return f"a cache of its own kind, {type(cache).__name__}"


def _latent_indices(model: nn.Module, n_caches: int) -> set[int]:
    """Cache indices whose layer keeps MLA latents.

    Layer i owns cache i where the numbers agree. Where they do not, one latent attention makes
    all of them suspect: compressing a latent is wrong, leaving a KV layer alone is only dear.
    """
    layers = [layer for layer in model.layers if layer is not None]
    if len(layers) == n_caches:
        return {i for i, layer in enumerate(layers) if _has_latent_attention(layer)}
    if any(_has_latent_attention(layer) for layer in layers):
        return set(range(n_caches))
    return set()


def _has_latent_attention(layer: nn.Module) -> bool:
    """Whether the layer holds an absorbed MLA: it maps queries into the latent and out of it."""
    return any("embed_q" in module and "unembed_out" in module for module in _modules(layer))


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Module):
        yield from module.modules()


def _pipeline_stage(model: nn.Module) -> Any | None:
    """The module that holds only a part of the layers, on a rank of a pipeline."""
    module: Any = model
    while isinstance(module, nn.Module):
        if getattr(module, "pipeline_size", 1) > 1 and hasattr(module, "start_idx"):
            return module
        module = getattr(module, "language_model", None) or getattr(module, "model", None)
    return None


def _ranges(indices: list[int]) -> str:
    """Sorted numbers as text, with runs of three or more shortened: 0-2, 4, 5."""
    parts: list[str] = []
    start = previous = indices[0]
    for index in [*indices[1:], None]:
        if index is not None and index == previous + 1:
            previous = index
            continue
        run = range(start, previous + 1)
        parts += [f"{start}-{previous}"] if len(run) > 2 else [str(i) for i in run]
        start = previous = index
    return ", ".join(parts)
