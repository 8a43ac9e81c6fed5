"""Cuts a prompt of the default model in several ways; run where row counts round nothing.

Prints, a line for each pair of formats and step: whether tokens and packed words are those of the
uncut prompt. No newest tokens are protected, or they would depend on the cut. test_generation.py
runs it with the weights quantised and OpenBLAS off: then MLX computes each row of a product alone.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
from greedy import greedy_tokens

import mlx_turbokv  # noqa: I001: before mlx.core, which it keeps from OpenBLAS here
from mlx_turbokv.loading.models import load

TEXT = "The lighthouse stood at the edge of the world, and every evening its keeper climbed up."


def run(model, prompt: list[int], pair: tuple[str, str], step: int) -> tuple[list[int], list]:
    """Tokens, and the words that the caches hold after them."""
    options = {"backend": "reference", "sink": 32, "recent": 0}
    caches = mlx_turbokv.make_prompt_cache(model, *pair, **options)
    tokens = greedy_tokens(model, prompt, caches, 3, prefill_step_size=step)
    parts = [part for cache in caches for part in (cache.body, cache.tail) if part is not None]
    mx.eval(parts)
    return tokens, [np.array(part) for part in parts]


def main(names: list[str]) -> None:
    loaded = load()
    prompt = loaded.tokenizer.encode(TEXT)
    for name in names:
        pair = tuple(name.split("/"))
        tokens, words = run(loaded.model, prompt, pair, 2048)
        for step in (13, 5, 1):
            cut_tokens, cut_words = run(loaded.model, prompt, pair, step)
            n_other = sum(np.count_nonzero(a != b) for a, b in zip(words, cut_words))
            print(name, step, cut_tokens == tokens, n_other)


if __name__ == "__main__":
    main(sys.argv[1:])
