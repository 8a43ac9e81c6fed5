"""Times of a model's generation, by mlx-lm's own functions, of one sequence or a batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import PromptProcessingBatch, generate_step, generation_stream

BUILD_STEPS = 16


def caches_for(make_caches: Callable[[], list[Any]], batch_size: int) -> list[Any]:
    """Empty caches of so many sequences, as mlx-lm's batch_generate makes them.

    Raises:
        ValueError: a cache holds one sequence alone.
    """
    if batch_size == 1:
        return make_caches()
    singles = [make_caches() for _ in range(batch_size)]
    for cache in singles[0]:
        if not hasattr(cache, "merge"):
            raise ValueError(f"{type(cache).__name__} holds one sequence, not {batch_size}.")
    return [same[0].merge(list(same)) for same in zip(*singles)]


def generate(
    model: nn.Module, prompt: mx.array, caches: list[Any], n_tokens: int, prefill_step_size: int
) -> tuple[float, float]:
    """Seconds until each sequence's first token, and seconds a step after it.

    Shapes:
        prompt: [B, T] int32.
    """
    timed = _one if prompt.shape[0] == 1 else _batch
    seconds = timed(model, prompt, caches, n_tokens, prefill_step_size)
    mx.eval([c.state for c in caches])  # the step that was begun ahead has ended too
    return seconds


def _one(
    model: nn.Module, prompt: mx.array, caches: list[Any], n_tokens: int, prefill_step_size: int
) -> tuple[float, float]:
    start = time.perf_counter()
    steps = generate_step(
        prompt[0], model, max_tokens=n_tokens + 1, prompt_cache=caches,
        prefill_step_size=prefill_step_size,
    )  # fmt: skip
    next(steps)
    first = time.perf_counter()
    for _ in range(n_tokens):
        next(steps)
    last = time.perf_counter()
    steps.close()
    return first - start, (last - first) / n_tokens


def _batch(
    model: nn.Module, prompt: mx.array, caches: list[Any], n_tokens: int, prefill_step_size: int
) -> tuple[float, float]:
    """As batch_generate does it, whose prompts are all processed before it generates."""
    prompts: Any = prompt.tolist()
    n = len(prompts)
    with mx.stream(generation_stream):
        start = time.perf_counter()
        batch = PromptProcessingBatch(
            model, list(range(n)), [], tokens=[[] for _ in prompts],
            prefill_step_size=prefill_step_size, max_tokens=[n_tokens + 2] * n,
        )  # fmt: skip
        batch.prompt_cache = caches
        generating = batch.generate(prompts)
        generating.next()
        first = time.perf_counter()
        for _ in range(n_tokens):
            generating.next()
        last = time.perf_counter()
    return first - start, (last - first) / n_tokens


def build_times(model: nn.Module, caches: list[Any], batch_size: int) -> list[float]:
    """Seconds of Python that building one decode step takes, without computing it."""
    token, times = mx.zeros((batch_size, 1), mx.int32), []
    for _ in range(BUILD_STEPS):
        start = time.perf_counter()
        logits = model(token, cache=caches)[:, -1]
        times.append(time.perf_counter() - start)
        mx.eval(logits, [c.state for c in caches])
    return times
