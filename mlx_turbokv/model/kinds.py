"""mlx-lm's cache classes, and those of the same names that mlx-vlm has for its own models.

mlx-vlm is optional: its classes count once something has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..errors import InputError

MLX_VLM = "mlx_vlm"
_MLX_VLM_CACHE = f"{MLX_VLM}.models.cache"
_QWEN4_EXP = f"{MLX_VLM}.models.qwen4_exp.language"


def kind(name: str) -> tuple[type, ...]:
    """mlx-lm's cache class of this name, and mlx-vlm's."""
    modules = (mlx_lm_cache, sys.modules.get(_MLX_VLM_CACHE))
    return tuple(vars(module)[name] for module in modules if hasattr(module, name))


def is_a(cache: Any, name: str) -> bool:
    """Whether a cache is of the class of this name, or of one derived from it."""
    return isinstance(cache, kind(name))


def is_just(cache: Any, name: str) -> bool:
    """Whether a cache is of the class of this name, and of no derived one."""
    return type(cache) in kind(name)


def is_indexed(cache: Any) -> bool:
    """Whether a cache keeps an indexer's keys beside K and V, as that of mlx-vlm's qwen4_exp."""
    return type(cache) is getattr(sys.modules.get(_QWEN4_EXP), "QSAKVCache", None)


def is_of_mlx_vlm(model: Any) -> bool:
    """Whether a model is one of mlx-vlm's."""
    return any(base.__module__.split(".")[0] == MLX_VLM for base in type(model).__mro__)


def new_cache(model: nn.Module, name: str, *args: Any) -> Any:
    """A cache of the class of this name, from the library that the model is of."""
    module = sys.modules[_MLX_VLM_CACHE] if is_of_mlx_vlm(model) else mlx_lm_cache
    return getattr(module, name)(*args)


def check_model(model: Any) -> None:
    """Raises: InputError for what is no model."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, (tuple, list)) and model and isinstance(model[0], nn.Module):
        raise InputError(
            "A tuple is not accepted as a model: give the model without its tokenizer."
        )
    raise InputError(
        f"{model!r} is not accepted as a model: give one that mlx_lm.load or mlx_vlm.load returns."
    )
