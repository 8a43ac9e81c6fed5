"""Speculative decoding: which caches can take rejected tokens back, and how many.

mlx-lm's loop asks whether *any* number of tokens can be taken back, goes on where the answer turns
to no, and so continues from rejected tokens once a window has moved on. Its two functions are
replaced: a packed window takes back what it has kept for this, and what cannot be taken back is an
error.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .rotating import SPARE_TOKENS, TurboRotatingKVCache
from .summary import leaves


def check(
    name: str,
    caches: Sequence[Any],
    draft_caches: Sequence[Any],
    num_draft_tokens: int,
    n_tokens: float | None = None,
) -> None:
    """Check that a draft model can be used with a model.

    Args:
        name: of the model.
        caches, draft_caches: of the model and of the draft model, as they will be used.
        num_draft_tokens: how many tokens are drafted at a time.
        n_tokens: how many the caches may have to hold; None for any number.

    Raises:
        InputError: rejected tokens could not be taken back from one of the caches.
    """
    both = list(leaves([*caches, *draft_caches]))
    if not all(_window(cache) or cache.is_trimmable() for cache in both):
        raise InputError(f"{name} cannot decode speculatively: its cache cannot be taken back.")
    if num_draft_tokens > SPARE_TOKENS and any(_goes_back(cache) for cache in both):
        raise InputError(
            f"{num_draft_tokens} draft tokens are not accepted: a packed window can take "
            f"{SPARE_TOKENS} tokens back; give at most as many."
        )
    windows = [_window(cache) for cache in both if _window(cache) and not _goes_back(cache)]
    if windows and (math.inf if n_tokens is None else n_tokens) > min(windows):
        raise InputError(
            f"A draft model cannot be used beyond a window of {min(windows):,} tokens, from "
            "which mlx-lm takes no rejected tokens back; give a shorter prompt and "
            "--max-tokens, --compress-sliding for a model with sliding windows, or no "
            "--draft-model."
        )


def can_take_back(caches: Sequence[Any]) -> bool:
    """Whether drafted tokens can be taken back from all caches now."""
    return all(_goes_back(cache) or cache.is_trimmable() for cache in leaves(caches))


def take_back(caches: Sequence[Any], n: int) -> int:
    """Take ``n`` rejected tokens back from all caches; returns how many.

    Raises:
        ValueError: one of them cannot.
    """
    if n == 0 or not caches:
        return 0
    if not can_take_back(caches):
        kinds = sorted({type(c).__name__ for c in leaves(caches) if not can_take_back([c])})
        raise ValueError(
            f"[speculative decoding] {n} rejected tokens cannot be taken back from "
            f"{', '.join(kinds)}."
        )
    return [cache.trim(n) for cache in caches][0]


def _goes_back(cache: Any) -> bool:
    """Whether this is a packed window; kept first tokens are hidden from drafted ones."""
    return isinstance(cache, TurboRotatingKVCache) and not cache.keep


def _window(cache: Any) -> int | None:
    return getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)


# the package's attribute of this name is a function
_generate = importlib.import_module("mlx_lm.generate")
_generate.can_trim_prompt_cache = can_take_back
_generate.trim_prompt_cache = take_back
