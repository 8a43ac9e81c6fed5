"""config.json files, and mlx-lm models built from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError
from ..files import parse_json, read_text
from .config_numbers import check_numbers


def read_config(path: Path, source: str) -> dict[str, Any]:
    """Read a config.json.

    Args:
        source: what the user gave, for messages.

    Raises:
        InputError: missing, unreadable, not a model's, or with a number that no model has.
    """
    try:
        config = parse_json(read_text(path))
    except FileNotFoundError as error:
        raise InputError(f"The folder {source} has no config.json.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable config.json ({first_line(error)}).") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path} is not a model's config.json: it names no model_type.")
    check_numbers(config, str(path))
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that describes the language model."""
    return config.get("text_config") or config


def max_context(config: dict[str, Any]) -> int | None:
    """The positions that a config.json says the model was made for."""
    for level in (config, text_config(config)):
        if value := level.get("max_position_embeddings"):
            return int(value)
    return None


# Models that have an output layer of their own until mlx-lm sees weights without one.
_TIED_BY_WEIGHTS = ("gemma3", "gemma3_text")


def build_model(config: dict[str, Any], name: str | None = None) -> Any:
    """The mlx-lm model of a configuration, with lazy weights.

    One whose embedding is its output layer too, by the configuration, has no other.

    Raises:
        InputError: mlx-lm has no such model, or the configuration does not fit it.
    """
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
    except Exception as error:  # a model's own code may raise anything
        kind = f"model type {config.get('model_type')!r}"
        what = f"{name} ({kind})" if name else kind
        raise InputError(f"mlx-lm cannot build {what}: {first_line(error)}") from error
    if config["model_type"] in _TIED_BY_WEIGHTS and config.get("tie_word_embeddings", True):
        getattr(model, "language_model", model).sanitize({})
    return model


def parameters(model: nn.Module) -> dict[str, Any]:
    """The arrays of a model's parameters by name."""
    return dict(tree_flatten(model.parameters()))


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
