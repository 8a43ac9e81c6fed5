"""Tiny random language models of every package of the installed mlx-vlm that has one.

The values of mlx-lm's tiny models serve here as well; what a package needs beyond them stands in
``tiny_vlm_configs.py``. Vision towers are left out: caches belong to language models.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import tiny_configs
from mlx.utils import tree_map
from tiny_models import lively
from tiny_vlm_configs import OVERRIDES, WHOLE, WITHOUT_CACHES

TOKENS = "_id", "_index"  # how fields of token ids end


class _Config(SimpleNamespace):
    """A configuration whose tokens that nobody named never occur."""

    def __getattr__(self, name: str) -> int:
        if name.endswith(TOKENS):
            return -1
        raise AttributeError(name)


# what language models ask of their vision configuration
VISION = _Config(spatial_merge_size=2, temporal_patch_size=2, spatial_patch_size=14, channel_size=3)


def language_models() -> list[str]:
    """Every package of mlx_vlm.models that holds a language model."""
    import mlx_vlm.models

    found = {
        module.name for module in pkgutil.iter_modules(mlx_vlm.models.__path__) if module.ispkg
    }
    return sorted(found - WITHOUT_CACHES)


def tiny_language_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """The language model of package ``name`` with random float32 weights.

    Args:
        changes: fields of its text configuration to set otherwise.
    """
    mx.random.seed(seed)
    model = _build(name, changes)
    if name == "jina_vlm":  # its head is put there by the whole model
        model.lm_head = nn.Linear(128, 96, bias=False)
    if name == "phi3small":  # it masks token ids above 100,256, outside a tiny vocabulary
        model._dummy_tokenizer_ids = mx.array([], mx.int32)
    if name == "afm7":  # K and V are rounded to multiples of a learnt scale
        for layer in model.layers:
            layer.self_attn.quant_key_scale = layer.self_attn.quant_value_scale = mx.array(0.01)
    model.update(tree_map(lively, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()


def _build(name: str, changes: dict[str, Any]) -> nn.Module:
    package = importlib.import_module(f"mlx_vlm.models.{name}")
    kind = _class_of_language_model(package, name)
    if kind is None:
        config = _filled(package.ModelConfig, name, changes)
        model = package.Model(config)
        if name == "phi3_v":  # its vision tower, which has one size alone
            del model.model.vision_embed_tokens
        return getattr(model, "language_model", model)
    parameters = [p for p in inspect.signature(kind).parameters.values()
                  if p.kind is p.POSITIONAL_OR_KEYWORD]  # fmt: skip
    is_whole = parameters[0].annotation in ("ModelConfig", package.ModelConfig)
    whole = _whole_config(package, name, changes)
    if is_whole or not hasattr(package, "TextConfig"):
        return kind(whole)
    if not hasattr(whole, "text_config"):
        return kind(_filled(package.TextConfig, name, changes))
    return kind(*[whole.text_config, whole][: min(len(parameters), 2)])


def _class_of_language_model(package: Any, name: str) -> type | None:
    for module in (package, _submodule(package, name), _submodule(package, "language")):
        kind = getattr(module, "LanguageModel", None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind
    return None


def _submodule(package: Any, name: str) -> Any:
    try:
        return importlib.import_module(f"{package.__name__}.{name}")
    except ModuleNotFoundError:
        return None


def _whole_config(package: Any, name: str, changes: dict[str, Any]) -> Any:
    """A model's configuration, of which only the text model's part is filled."""
    names = {field.name for field in dataclasses.fields(package.ModelConfig)}
    if "text_config" not in names and "thinker_config" not in names:
        return _filled(package.ModelConfig, name, changes)
    text = _filled(package.TextConfig, name, changes)
    values = {"model_type": name, **vars(text), "text_config": text, "vision_config": VISION}
    found = _defaults(package.ModelConfig).items()
    defaults = {k: v for k, v in found if v is not None or not k.endswith(TOKENS)}
    own = {k: v for k, v in _known(name, changes).items() if k in names}
    return _Config(**{**defaults, **own, **values, **WHOLE.get(name, {})})


def _defaults(kind: type) -> dict[str, Any]:
    return {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }


def _filled(kind: Any, name: str, changes: dict[str, Any]) -> Any:
    """A configuration of class ``kind`` with small values."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in _known(name, changes).items() if k in names})


def _known(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Small values by the names of fields."""
    inner, own = name, {}
    if name in tiny_configs.INNER:
        inner, _, own = tiny_configs.INNER[name]
    base = {**tiny_configs.COMMON, "model_type": name, **tiny_configs.OVERRIDES.get(inner, {})}
    return {**base, **own, **OVERRIDES.get(name, {}), **changes}
