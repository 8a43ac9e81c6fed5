"""Models of a given shape with random quantised weights, for timing without a download."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from ..errors import InputError
from .config import build_model, parameters, read_config
from .known_shapes import KNOWN, known_config

WEIGHT_BITS = (2, 3, 4, 5, 6, 8, 16)
DTYPES = ("float16", "bfloat16", "float32")
GROUP = 64
# Codes of b bits are spread evenly, so their deviation is this share of the largest code.
_SPREAD = 1 / math.sqrt(12)


def shape_config(name: str) -> tuple[dict[str, Any], str]:
    """(config, name) of a built-in shape or of a config.json.

    Raises: InputError for another name, or a file that is no model's configuration.
    """
    config = known_config(name)
    if config is not None:
        return config, name
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"Unknown shape {name!r}: accepted are {', '.join(KNOWN)} or a config.json file."
        )
    config = read_config(path, name)
    return config, str(config.get("_name_or_path") or path.parent.name or path.name)


def check_dtype(dtype: str) -> None:
    """Raises: InputError for a type that models do not run in."""
    if dtype not in DTYPES:
        raise InputError(f"Type {dtype!r} is not accepted: give one of {', '.join(DTYPES)}.")


def random_model(
    config: dict[str, Any],
    bits: int = 4,
    group_size: int = GROUP,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> nn.Module:
    """A model of mlx-lm with random weights of ``bits`` bits, evaluated.

    Packed words are drawn directly, with constant scales that give each matrix the variance of an
    untrained one. mlx-lm's own weights stay lazy, so quantised weights never have a 16-bit copy.

    Args:
        bits: 2 to 8 for quantised linear and embedding layers, 16 for weights in ``dtype``.
        dtype: type of activations, and so of K and V.

    Raises:
        InputError: mlx-lm cannot build the model, or a value that is not accepted.
    """
    if bits not in WEIGHT_BITS:
        raise InputError(
            f"Weight bits {bits} are not accepted: give one of {', '.join(map(str, WEIGHT_BITS))}."
        )
    check_dtype(dtype)
    mx.random.seed(seed)
    model = build_model(config)
    model.set_dtype(getattr(mx, dtype))
    if bits < 16:
        nn.quantize(
            model, group_size, bits,
            class_predicate=lambda _, m: hasattr(m, "to_quantized") and _divides(m, group_size),
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
                _draw(module, getattr(mx, dtype))
    model.update(tree_map_with_path(_make, model.parameters()))
    return model.eval()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(array.nbytes for array in parameters(model).values())


def _divides(module: nn.Module, group_size: int) -> bool:
    weight = module.get("weight")
    return weight is not None and weight.shape[-1] % group_size == 0


def _draw(module: Any, dtype: mx.Dtype) -> None:
    """Replace a layer's lazy weights by random packed words and constant scales."""
    shape = module.weight.shape
    halves = mx.random.randint(0, 1 << 16, (*shape[:-1], 2 * shape[-1])).astype(mx.uint16)
    module.weight = halves.view(mx.uint32)
    largest = (1 << module.bits) - 1
    columns = module.scales.shape[-1] * module.group_size
    scale = 1 / (math.sqrt(columns) * largest * _SPREAD)
    groups = module.scales.shape
    module.scales = mx.full(groups, scale, dtype)
    module.biases = mx.full(groups, -scale * largest / 2, dtype)
    mx.eval(module.weight, module.scales, module.biases)
    mx.clear_cache()


def _make(_path: str, array: mx.array) -> mx.array:
    """Evaluate one weight at a time, so that what makes it is freed before the next."""
    mx.eval(array)
    return array


def vocabulary_size(config: dict[str, Any]) -> int:
    """The vocabulary size of a config.json; 256 if it names none."""
    text = config.get("text_config") or config
    return int(text.get("vocab_size") or 256)
