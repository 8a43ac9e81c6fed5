"""Tiny random models of every architecture of the installed mlx-lm.

One table of small values by field name fills each architecture's ModelArgs; what an architecture
needs beyond that stands in ``tiny_configs.py``. Experts are all active, so that a router's choice
cannot flip and logits stay continuous in K and V.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
import types
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map
from tiny_configs import COMMON, INNER, OVERRIDES

HELPERS = {
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
}


def architectures() -> list[str]:
    """Every module of mlx_lm.models but the helpers that hold no model."""
    names = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    return sorted(names - HELPERS)


def import_architecture(name: str) -> types.ModuleType:
    """The module of one architecture."""
    # olmo only asks whether this package is there, and ends the process if it is not
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    return importlib.import_module(f"mlx_lm.models.{name}")


def tiny_config(name: str, **changes: Any) -> dict[str, Any]:
    """A configuration of architecture ``name`` with tiny dimensions.

    Args:
        changes: fields to set otherwise, in the text model's part where there is one.
    """
    config = {**_fields_of(name, "ModelArgs"), **OVERRIDES.get(name, {})}
    if name not in INNER:
        return {**config, **changes}
    inner, arguments, inner_changes = INNER[name]
    base = OVERRIDES.get(inner, {}) if inner != name else {}
    config["text_config"] = {**_fields_of(inner, arguments), **base, **inner_changes, **changes}
    return config


def _fields_of(name: str, arguments: str) -> dict[str, Any]:
    fields = dataclasses.fields(getattr(import_architecture(name), arguments))
    names = {field.name for field in fields}
    return {**{key: COMMON[key] for key in names & COMMON.keys()}, "model_type": name}


def tiny_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of architecture ``name`` with random float32 weights."""
    module = import_architecture(name)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(tiny_config(name, **changes)))
    parameters = tree_map(_lively, model.parameters())
    model.update(parameters)
    mx.eval(model.parameters())
    return model.eval()


def _lively(weight: mx.array) -> mx.array:
    """Weights as they are, but zeros become small noise: a zero bias or sink would hide errors."""
    if not mx.issubdtype(weight.dtype, mx.floating):
        return weight
    if weight.size and not mx.any(weight).item():
        return 0.1 * mx.random.normal(weight.shape, weight.dtype)
    return weight
