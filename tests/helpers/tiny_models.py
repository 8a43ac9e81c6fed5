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
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
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
    model.update(tree_map(lively, model.parameters()))
    if name in ADJUST:
        ADJUST[name](model)
    mx.eval(model.parameters())
    return model.eval()


def lively(weight: mx.array) -> mx.array:
    """Weights as they are, but zeros become small noise: a zero bias or sink would hide errors."""
    if not mx.issubdtype(weight.dtype, mx.floating):
        return weight
    if weight.size and not mx.any(weight).item():
        return 0.1 * mx.random.normal(weight.shape, weight.dtype)
    return weight


def plain_ops_for_bitnet(layer: Any, x: mx.array, packed: mx.array) -> mx.array:
    """What bitnet's Metal kernel computes, for machines without Metal."""
    rows = [((packed >> (2 * i)) & 3).astype(x.dtype) - 1 for i in range(4)]
    return x @ mx.concatenate(rows).T * layer.weight_scale


def _finer_fake_quantisation(model: nn.Module) -> None:
    """afm7 rounds K and V to multiples of a learnt scale; 1 would leave a few integers."""
    for layer in model.layers:
        attention = layer.self_attn
        attention.quant_key_scale = attention.quant_value_scale = mx.array(0.01)


def _ternary_weights(model: nn.Module) -> None:
    """bitnet's packed weights start as all -1, which makes every row of K and V the same."""
    for module in model.modules():
        if "weight_scale" in module:
            shape = module.weight.shape
            module.weight = mx.random.randint(0, 256, shape).astype(mx.uint8)
            module.weight_scale = mx.array([shape[-1] ** -0.5])


def _no_reserved_tokens(model: nn.Module) -> None:
    """phi3small masks token ids above 100,256, which lie outside a tiny vocabulary."""
    model._dummy_tokenizer_ids = mx.array([], mx.int32)


ADJUST: dict[str, Callable[[nn.Module], None]] = {
    "afm7": _finer_fake_quantisation,
    "bitnet": _ternary_weights,
    "phi3small": _no_reserved_tokens,
}


def run_session(model: nn.Module, caches: list[Any], cuts: list[int], n_decode: int) -> mx.array:
    """Logits of a prompt in uneven cuts, decoded tokens, and a continuation after a trim.

    Shapes:
        returns: [positions, vocabulary] float32.
    """
    tokens = [(7 * i * i + 3 * i + 1) % 89 for i in range(sum(cuts) + n_decode + 8)]
    at, logits = 0, []

    def feed(n: int) -> None:
        nonlocal at
        output = model(mx.array([tokens[at : at + n]]), cache=caches)
        output = getattr(output, "logits", output)  # mlx-vlm's models return more than logits
        logits.append(output[0].astype(mx.float32))
        mx.eval(logits[-1])
        at += n

    for n in cuts:
        feed(n)
    for _ in range(n_decode):
        feed(1)
    if can_trim_prompt_cache(caches):
        at -= trim_prompt_cache(caches, 5)
    feed(3 if max(cuts) > 1 else 1)
    feed(1)
    return mx.concatenate(logits)


@cache
def shared_model(name: str) -> nn.Module:
    """``tiny_model(name)``, built once; tests leave it as it is."""
    return tiny_model(name)
