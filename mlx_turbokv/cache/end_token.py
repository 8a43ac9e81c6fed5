"""The end token in a prompt cache file's metadata, as mlx_lm.cache_prompt --eos-token puts it."""

from __future__ import annotations

import json
from typing import Any

from ..files import parse_json

KEY = "tokenizer_config"


def written(token: str | None) -> dict[str, str]:
    """The metadata for a token; None sets none."""
    return {KEY: json.dumps({} if token is None else {"eos_token": token})}


def read(metadata: dict[str, Any]) -> str | None:
    """The token that a file's metadata sets, if they set one.

    Raises:
        ValueError: they do not say it as mlx-lm does.
    """
    text = metadata.get(KEY, "{}")
    try:
        config = parse_json(text) if isinstance(text, str) else None
    except ValueError:
        config = None
    token = config.get("eos_token") if isinstance(config, dict) else 0
    if token is not None and not isinstance(token, str):
        raise ValueError("it does not say its end token")
    return token
