"""MLX's random state after an exception within a function that MLX compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx


@contextlib.contextmanager
def kept_if_it_fails() -> Iterator[None]:
    """Put the thread's random state back to what it was if an exception is raised.

    Samplers are compiled with the random state as an input. An exception while MLX traces one
    leaves a placeholder in the state, and everything that is sampled from it fails.
    """
    state: Any = mx.random.state
    before = state[0]
    try:
        yield
    except BaseException:
        if state[0] is not before:
            high, low = before.tolist()  # a key is its seed's two halves
            mx.random.seed(high << 32 | low)
        raise
