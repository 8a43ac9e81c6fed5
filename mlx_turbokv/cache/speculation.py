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

ANY_NUMBER = 1 << 24


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
    if not all(_goes_back(c) or _window(c) or c.is_trimmable() for c in both):
        raise InputError(f"{name} cannot decode speculatively: its cache cannot be taken back.")
    if num_draft_tokens > (most := most_draft_tokens(both)):
        raise InputError(
            f"{num_draft_tokens} draft tokens are not accepted: {most} can be taken back; give at "
            "most as many."
        )
    windows = [n for n in map(_window, both) if n is not None]
    if windows and (math.inf if n_tokens is None else n_tokens) > min(windows):
        raise InputError(
            f"A draft model cannot be used beyond a window of {min(windows):,} tokens, from "
            "which mlx-lm takes no rejected tokens back; give a shorter prompt and "
            "--max-tokens, --compress-sliding for a model with sliding windows, or no "
            "--draft-model."
        )


def most_draft_tokens(caches: Sequence[Any]) -> int:
    """How many tokens may be drafted at a time."""
    return SPARE_TOKENS if any(_goes_back(cache) for cache in leaves(caches)) else ANY_NUMBER


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
    """Tokens of a window that drops what a draft's tokens push out."""
    if _goes_back(cache):
        return None
    return getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)


# the package's attribute of this name is a function
_generate: Any = importlib.import_module("mlx_lm.generate")
_generate.can_trim_prompt_cache = can_take_back
_generate.trim_prompt_cache = take_back
