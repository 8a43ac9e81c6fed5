"""The numbers of a config.json that this package reads, checked before a model is built.

Numbers that are missing, or null, are the model's own affair.
"""

from __future__ import annotations

import math
from typing import Any

from ..checked import INTEGER, Kind, of

MOST = (1 << 31) - 1  # of one dimension of an array in MLX
MOST_LAYERS = 10_000
MOST_TOKENS = 1 << 40


def _whole(least: int, most: int) -> Kind:
    accepted = f"a whole number from {max(least, 1)} to {most:,}"
    return Kind(accepted, lambda value: INTEGER.fits(value) and least <= value <= most)


def _by_layer(kind: Kind) -> Kind:
    """The same, or a list of numbers of the layers, some of which may have none."""
    of_layer = _whole(0, MOST).or_none()

    def fits(value: Any) -> bool:
        return all(map(of_layer.fits, value)) if isinstance(value, list) else kind.fits(value)

    return Kind(kind.accepted, fits)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


_COUNT, _COUNT_OR_0 = _whole(1, MOST), _whole(0, MOST)
_OBJECT = of("an object or null", dict, type(None))
# models with 0 in some of them have a number of their own
NUMBERS = {
    "hidden_size": _COUNT,
    "intermediate_size": _by_layer(_COUNT_OR_0),
    "num_hidden_layers": _whole(1, MOST_LAYERS),
    "num_attention_heads": _by_layer(_COUNT),
    "num_key_value_heads": _by_layer(_COUNT),
    "head_dim": _COUNT_OR_0,
    "v_head_dim": _COUNT_OR_0,
    "vocab_size": _COUNT,
    "max_position_embeddings": Kind(
        f"a number from 1 to {MOST_TOKENS:,}", lambda x: _is_number(x) and 0 <= x <= MOST_TOKENS
    ),
}
_QUANTISATION = {
    "bits": Kind("a number above 0", lambda x: _is_number(x) and 0 < x <= 64),
    "group_size": _COUNT,
}


def check_numbers(config: dict[str, Any], name: str) -> None:
    """Check the numbers of a configuration, and of its ``text_config`` and ``quantization``.

    Args:
        name: what to call it in messages.

    Raises:
        InputError: a number that no model has.
    """
    for part in ("text_config", "quantization"):
        _OBJECT(f"{name}: {part}", config.get(part))
    for level in (config, config.get("text_config") or {}):
        _check(level, NUMBERS, name)
    quantisation = config.get("quantization") or {}
    layers = (x for x in quantisation.values() if isinstance(x, dict))
    for level in (quantisation, *layers):
        _check(level, _QUANTISATION, name)


def _check(level: dict[str, Any], kinds: dict[str, Kind], name: str) -> None:
    for key, kind in kinds.items():
        if level.get(key) is not None:
            kind(f"{name}: {key}", level[key])
