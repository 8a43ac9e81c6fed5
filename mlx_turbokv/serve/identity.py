"""Which model, and which caches of it, an entry on disk belongs to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..cache.summary import leaves
from ..model.probing import after_one_token

SAMPLES = 64  # values of each weight


@dataclass(frozen=True)
class CacheKind:
    """A model's caches under one policy.

    digest: the same for the same weights, formats, windows, centres and format version.
    fresh: empty caches.
    own: the model's own caches after one token; None for a model that needs more than tokens.
    """

    digest: str
    fresh: list[Any]
    own: list[Any] | None

    @classmethod
    def of(cls, models: list[nn.Module]) -> CacheKind:
        """The kind of a model's caches; of several, of a model and its draft model.

        Args:
            models: with whatever is attached to them.
        """
        found = hashlib.sha256()
        fresh: list[Any] = []
        own: list[Any] | None = []
        for model in models:
            _add_model(found, model)
            fresh += make_prompt_cache(model)
            one = after_one_token(model)
            own = None if own is None or one is None else own + one
        _add_caches(found, fresh)
        if own is not None:  # unevaluated arrays would keep the weights
            mx.eval([cache.state for cache in own])
        return cls(found.hexdigest(), fresh, own)


def _add_model(found: Any, model: nn.Module) -> None:
    """Architecture, arguments, and of each weight its shape and some values."""
    found.update(f"{type(model).__module__} {getattr(model, 'args', None)!r}".encode())
    weights: Any = tree_flatten(model.parameters())
    samples = []
    for name, weight in weights:
        found.update(f"{name} {weight.shape} {weight.dtype}".encode())
        step = max(1, weight.size // SAMPLES)
        samples.append(weight.reshape(-1)[::step][:SAMPLES])
    mx.eval(samples)
    for sample in samples:
        found.update(np.array(mx.contiguous(sample).view(mx.uint8)).tobytes())


def _add_caches(found: Any, fresh: list[Any]) -> None:
    """What empty caches say of themselves: version, formats, windows and centres."""
    for leaf in leaves(fresh):
        found.update(type(leaf).__name__.encode())
        state: Any = tree_flatten(leaf.state, is_leaf=lambda x: x is None)
        for name, value in state:
            if isinstance(value, mx.array):
                value = np.array(mx.contiguous(value).reshape(-1).view(mx.uint8)).tobytes()
            found.update(f"{name} {value!r}".encode())
