"""Finds the KV layers of any model of mlx-lm or mlx-vlm, in order.

The model's own cache factory says what each layer keeps. A plain ``KVCache`` grows with the
context and is compressed; a ``RotatingKVCache`` holds a sliding window and is compressed if that is
asked for; everything else is left alone, with a reason. A factory does not tell that absorbed
multi-head latent attention (MLA) keeps latents in its ``KVCache``: the attention modules show that.
Nor does it tell which layers use another layer's K and V and leave their own cache empty: a call
with one token shows that, the shapes of K and V, and whose K and V a model takes by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.nn as nn

from .caches import Position, model_layers, own_caches
from .kinds import is_a, is_indexed, is_just, is_of_mlx_vlm
from .probing import record_one_token
from .shapes import KVShape

RECURRENT = "recurrent state"
LATENT = "MLA latent"
COMPOSITE = "several caches a layer, with keys of an indexer"
UNUSED = "unused: the layer stores no K and V of its own"
READ = "shared: other layers take K and V out of the cache's state"
CROSS = "cross-attention: K and V of what an encoder read"
DIFFUSION = "diffusion: the model generates with caches that it makes itself"


@dataclass(frozen=True)
class KVLayer:
    """A KV layer that can be compressed.

    Args:
        ordinal: position among the whole model's KV layers, what policies count.
        index: position in the cache list.
        sub: position inside a CacheList, or None.
        shape: heads and head_dims, where a call with one token could show them.
        window: tokens of its sliding window, or None for a layer whose cache grows.
        is_read: whether the model takes K and V out of the cache itself.
        is_indexed: whether the cache also keeps the keys of an indexer.
    """

    ordinal: int
    index: int
    sub: int | None = None
    shape: KVShape | None = None
    window: int | None = None
    is_read: bool = False
    is_indexed: bool = False


@dataclass(frozen=True)
class Skipped:
    """A cache that is left as it is, and why; ``window`` as in ``KVLayer``."""

    index: int
    reason: str
    sub: int | None = None
    window: int | None = None


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

    @property
    def positions(self) -> list[Position]:
        """Where the caches of ``layers`` stand."""
        return [(layer.index, layer.sub) for layer in self.layers]

    def notes(self) -> list[str]:
        """One sentence for each reason why caches were left alone."""
        by_reason: dict[str, list[int]] = {}
        for entry in self.skipped:
            indices = by_reason.setdefault(entry.reason, [])
            if entry.index not in indices:
                indices.append(entry.index)
        return [
            f"Not compressed: layer{'s' * (len(indices) > 1)} {ranges(indices)} ({reason})."
            for reason, indices in by_reason.items()
        ]


def kv_layers(
    model: nn.Module, caches: list[Any] | None = None, compress_sliding: bool = False
) -> KVLayers:
    """Find the layers that can be compressed: growing caches, and sliding windows if asked.

    Ordinals count the compressed layers in the model's order, so sliding layers have ordinals, and
    shift those of the others, only with ``compress_sliding``.

    Args:
        model: a model of mlx-lm.
        caches: what the model's own factory made (default: call it); they are only looked at.
        compress_sliding: whether layers with a sliding window are KV layers too.
    """
    caches = own_caches(model) if caches is None else caches
    stage = _pipeline_stage(model)
    if stage is None:
        return _without_unused(model, _classify(model, caches, compress_sliding))
    whole = kv_layers(model_skeleton(model), None, compress_sliding)
    here = range(stage.start_idx, stage.start_idx + len(caches))
    layers = [replace(x, index=x.index - here.start) for x in whole.layers if x.index in here]
    skipped = [replace(x, index=x.index - here.start) for x in whole.skipped if x.index in here]
    return KVLayers(layers, skipped, whole.n_total)


def model_skeleton(model: nn.Module) -> nn.Module:
    """A whole model of the same configuration; its weights are lazy and never computed."""
    args = getattr(model, "args", None) or getattr(model, "config", None)
    kind: Any = type(model)
    return kind(args)


def _without_unused(model: nn.Module, found: KVLayers) -> KVLayers:
    """Adds the shapes, and takes out layers that were seen to store nothing."""
    recorded = record_one_token(model, found.positions)
    if not recorded:
        return found
    layers: list[KVLayer] = []
    skipped = list(found.skipped)
    for layer in found.layers:
        cache = recorded.get((layer.index, layer.sub))
        if cache is None or (cache.is_read and not layer.is_read):
            skipped.append(Skipped(layer.index, UNUSED if cache is None else READ, layer.sub))
        else:
            layers.append(replace(layer, ordinal=len(layers), shape=cache.shape))
    skipped.sort(key=lambda x: x.index)
    return KVLayers(layers, skipped, len(layers))


def _classify(model: nn.Module, caches: list[Any], compress_sliding: bool) -> KVLayers:
    latent, diffuses = _latent_indices(model, len(caches)), _diffuses(model)
    is_read = diffuses and not _makes_caches_itself(model)
    layers: list[KVLayer] = []
    skipped: list[Skipped] = []
    for index, cache in enumerate(caches):
        if is_a(cache, "CacheList") and (_is_hybrid_list(cache) or _is_of_decoder(cache)):
            entries = [(sub, entry) for sub, entry in enumerate(cache.caches)]
        else:
            entries = [(None, cache)]
        for sub, entry in entries:
            # what a model reads itself is all rows of a cache, in their order
            reason = _why_not(entry, index in latent, compress_sliding and not is_read)
            if is_a(entry, "SimpleKVCache"):
                reason = CROSS if sub else None
            reason = DIFFUSION if reason is None and diffuses and not is_read else reason
            window = entry.max_size if is_a(entry, "RotatingKVCache") else None
            if reason is None:
                about = {"window": window, "is_read": is_read, "is_indexed": is_indexed(entry)}
                layers.append(KVLayer(len(layers), index, sub, **about))
            else:
                skipped.append(Skipped(index, reason, sub, window))
    return KVLayers(layers, skipped, len(layers))


def _is_hybrid_list(cache: Any) -> bool:
    """Whether the list is one recurrent and one attention cache of a parallel hybrid layer.

    Lists of KV caches alone belong to models that use them for other things than K and V.
    """
    return any(is_a(entry, "ArraysCache") for entry in cache.caches)


def _is_of_decoder(cache: Any) -> bool:
    """Whether the list is the caches of a decoder's self-attention and cross-attention."""
    return len(cache.caches) == 2 and all(is_just(x, "SimpleKVCache") for x in cache.caches)


def _why_not(cache: Any, latent: bool, compress_sliding: bool) -> str | None:
    rotates = is_just(cache, "RotatingKVCache")
    if is_just(cache, "KVCache") or is_indexed(cache) or (compress_sliding and rotates):
        return LATENT if latent else None
    if is_a(cache, "ArraysCache"):
        return RECURRENT
    if is_a(cache, "RotatingKVCache"):
        return f"sliding window of {cache.max_size} tokens"
    if is_a(cache, "ChunkedKVCache"):
        return f"chunked attention of {cache.chunk_size} tokens"
    if is_a(cache, "CacheList"):
        return LATENT if latent else COMPOSITE
    return f"a cache of its own kind, {type(cache).__name__}"


def _latent_indices(model: nn.Module, n_caches: int) -> set[int]:
    """Cache indices whose layer keeps MLA latents.

    Layer i owns cache i where the numbers agree. Where they do not, one latent attention makes
    all of them suspect: compressing a latent is wrong, leaving a KV layer alone is only dear.
    """
    layers = [layer for layer in model_layers(model) if layer is not None]
    if len(layers) == n_caches:
        return {i for i, layer in enumerate(layers) if _has_latent_attention(layer)}
    if any(_has_latent_attention(layer) for layer in layers):
        return set(range(n_caches))
    return set()


def _has_latent_attention(layer: nn.Module) -> bool:
    """Whether the layer holds an absorbed MLA: it maps queries into the latent and out of it."""
    return any("embed_q" in module and "unembed_out" in module for module in _modules(layer))


def _diffuses(model: nn.Module) -> bool:
    """Whether a model of mlx-vlm writes blocks of tokens at once, and generates by itself."""
    kind = type(model)
    is_named_so = "diffusion" in kind.__module__
    return is_of_mlx_vlm(model) and (is_named_so or callable(getattr(kind, "generate", None)))


def _makes_caches_itself(model: nn.Module) -> bool:
    """Whether the model's own ``generate`` does without ``make_cache``, for which ours stand in."""
    generate: Any = getattr(type(model), "generate", None)
    return callable(generate) and "make_cache" not in inspect.unwrap(generate).__code__.co_names


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Module):
        yield from module.modules()


def _pipeline_stage(model: nn.Module) -> Any | None:
    """The module that holds only a part of the layers, on a rank of a pipeline."""
    module: Any = model
    while isinstance(module, nn.Module):
        if getattr(module, "pipeline_size", 1) > 1 and hasattr(module, "start_idx"):
            return module
        inner = getattr(module, "language_model", None)
        is_own = inner is module  # some of mlx-vlm's models are their own language model
        module = getattr(module, "model", None) if inner is None or is_own else inner
    return None


def ranges(indices: list[int]) -> str:
    """Sorted numbers as text, with runs of three or more shortened: 0-2, 4, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = [[f"{r[0]}-{r[-1]}"] if len(r) > 2 else [str(i) for i in r] for r in runs]
    return ", ".join(text for part in parts for text in part)
