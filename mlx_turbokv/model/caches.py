"""The caches that a model makes by itself, and how one of them is replaced."""

from __future__ import annotations

import weakref
from typing import Any

import mlx.nn as nn

from .kinds import is_of_mlx_vlm, new_cache

Position = tuple[int, "int | None"]  # index in the list of caches, index in a CacheList or None


class ModelReference:
    """A weak reference to a model that follows deep copies of it.

    What a model holds keeps it by this: a cycle would keep a dropped model in memory until the next
    garbage collection.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self) -> nn.Module:
        """The model.

        Raises:
            ReferenceError: it is gone.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("The model that these caches were made for is gone.")
        return model

    def __deepcopy__(self, memo: dict) -> ModelReference:
        model = self()
        return ModelReference(memo.get(id(model), model))


def language_model(model: nn.Module) -> nn.Module:
    """The model that caches are made for and called with: of mlx-vlm's models, a part."""
    inner = getattr(model, "language_model", None) if is_of_mlx_vlm(model) else None
    return inner if isinstance(inner, nn.Module) else model


def own_caches(model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    """Caches from the model's own factory, whatever is attached to the instance."""
    attached: Any = vars(model).get("make_cache")
    while hasattr(attached, "turbokv_previous"):
        attached = attached.turbokv_previous
    if attached is not None:
        return attached(*args, **kwargs)
    factory: Any = getattr(type(model), "make_cache", None)
    if factory is not None:
        return factory(model, *args, **kwargs)
    return [new_cache(model, "KVCache") for _ in model_layers(model)]


def model_layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers; None for those of another rank of a pipeline."""
    layers: Any = model.layers
    return list(layers)


def cache_at(caches: list[Any], index: int, sub: int | None) -> Any:
    """The cache at this position."""
    return caches[index] if sub is None else caches[index].caches[sub]


def put_cache(caches: list[Any], index: int, sub: int | None, cache: Any) -> None:
    """Put a cache in a list of caches, or in the CacheList at ``index``."""
    if sub is None:
        caches[index] = cache
        return
    holder = caches[index]
    holder.caches = tuple(cache if i == sub else c for i, c in enumerate(holder.caches))
