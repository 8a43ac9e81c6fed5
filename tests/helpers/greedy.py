"""Greedy generation through two caches: the same tokens, or where and how narrowly they part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step


@dataclass(frozen=True)
class Agreement:
    """How far two greedy generations agree.

    Args:
        n_tokens: tokens that the reference generated.
        n_equal: tokens before the first difference; n_tokens where there is none.
        gap: how far the reference's logit of the other token lies below its own choice at the
            first difference, in nats; None where there is none.
        spread: standard deviation of the reference's logits there, for scale.
    """

    n_tokens: int
    n_equal: int
    gap: float | None = None
    spread: float | None = None


def greedy_tokens(model: nn.Module, prompt: list[int], cache: list, n: int, **options) -> list[int]:
    """The first ``n`` tokens of greedy generation; ends of text are not special."""
    steps = generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=cache, **options)
    return [int(token) for token, _ in steps]


def compare(
    model: nn.Module,
    prompt: list[int],
    reference: Callable[[], list],
    other: Callable[[], list],
    n: int = 100,
) -> Agreement:
    """Generate ``n`` tokens through a cache of each kind and compare them.

    Args:
        reference, other: make the caches.
    """
    expected = greedy_tokens(model, prompt, reference(), n)
    got = greedy_tokens(model, prompt, other(), n)
    n_equal = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), n)
    if n_equal == n:
        return Agreement(n, n)
    context = mx.array([prompt + expected[:n_equal]])
    logits = model(context, cache=reference())[0, -1].astype(mx.float32)
    gap = logits[expected[n_equal]] - logits[got[n_equal]]
    return Agreement(n, n_equal, gap.item(), mx.sqrt(mx.var(logits)).item())
