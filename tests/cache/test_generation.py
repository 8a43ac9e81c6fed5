"""The default model through packed caches: the text stays, however the prompt is cut."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from exact_rows import on_a_grid
from greedy import compare, greedy_tokens

from mlx_turbokv import TurboKVCache, attach, detach, make_prompt_cache
from mlx_turbokv.loading.models import load

pytestmark = pytest.mark.slow

NEAR_TIE = 0.2  # nats between the reference's two candidates: a factor of 1.22


@pytest.fixture(scope="module")
def loaded():
    return load()


def chat(loaded, text: str) -> list[int]:
    message = [{"role": "user", "content": text}]
    return loaded.tokenizer.apply_chat_template(message, add_generation_prompt=True)


@pytest.mark.parametrize(
    "text", ["Why is the sky blue?", "Give three tips for a first job interview."]
)
def test_greedy_text_through_q8_0_is_the_f16_text(loaded, text):
    result = compare(
        loaded.model,
        chat(loaded, text),
        lambda: make_prompt_cache(loaded.model, "f16", "f16"),
        lambda: make_prompt_cache(loaded.model, "q8_0", "q8_0"),
        n=40,
    )
    assert result.n_equal == result.n_tokens or result.gap < NEAR_TIE


def test_a_prompt_cut_anywhere_gives_the_same_tokens(loaded):
    """With OpenBLAS, K and V themselves move by 1e-7: its products round by the number of rows."""
    prompt = chat(loaded, "Tell me, in as many words as you like, how a bicycle stays upright.")
    texts = []
    for step in (2048, 32, 13, 5, 1):
        cache = make_prompt_cache(loaded.model, "q8_0", "q8_0")
        texts.append(greedy_tokens(loaded.model, prompt, cache, 8, prefill_step_size=step))
    assert all(text == texts[0] for text in texts)


def test_a_prompt_cut_anywhere_gives_the_same_bytes_and_tokens_through_the_model():
    """Where a row of a product does not depend on the others, nothing depends on the cut."""
    names = ["q8_0/turbo2", "turbo4/turbo3"]
    done = subprocess.run(
        [sys.executable, Path(__file__).resolve().parents[1] / "helpers" / "cut_prompt.py", *names],
        env={**os.environ, "TURBOKV_OPENBLAS": "0", "LD_PRELOAD": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    expected = [f"{name} {step} True 0" for name in names for step in (13, 5, 1)]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("pair", [("q8_0", "turbo2"), ("turbo4", "turbo3")])
def test_a_prompt_cut_anywhere_gives_the_same_bytes(loaded, pair, monkeypatch):
    """The K and V of a real prompt, on a grid, given to the cache in every even cut.

    No newest tokens are protected, or what is stored would depend on the cut.
    """
    seen = []
    update = TurboKVCache.update_and_fetch

    def spy(self, keys, values):
        seen.append((on_a_grid(keys), on_a_grid(values)))
        return update(self, *seen[-1])

    caches = make_prompt_cache(loaded.model, *pair, sink=32, recent=0)
    monkeypatch.setattr(TurboKVCache, "update_and_fetch", spy)
    prompt = mx.array([chat(loaded, "Describe how bread is made." * 60)])
    mx.eval(loaded.model(prompt, cache=caches), [cache.state for cache in caches])
    monkeypatch.undo()
    n = prompt.shape[1]
    assert n > 300  # body and tail
    for layer in (0, 17, 29):
        keys, values = seen[layer]
        expected = [np.array(x) for x in caches[layer].keys_and_values()]
        for step in (1, 5, 32, 33, 100, 256, n - 1):
            cut = TurboKVCache(*pair, sink=32)
            for start in range(0, n, step):
                stop = start + step
                cut.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
            for a, b in zip(expected, cut.keys_and_values()):
                assert np.array_equal(a, np.array(b))


def test_attach_reaches_mlx_lm_and_detach_restores(loaded):
    from mlx_lm import generate
    from mlx_lm.models.cache import make_prompt_cache as mlx_lm_make

    attach(loaded.model, "turbo4", "turbo4")
    try:
        assert all(type(c) is TurboKVCache for c in mlx_lm_make(loaded.model))
        text = generate(loaded.model, loaded.tokenizer, "The capital of France is", max_tokens=1)
    finally:
        detach(loaded.model)
    assert text == "Paris"  # mlx-lm strips the first space
    assert not any(type(c) is TurboKVCache for c in mlx_lm_make(loaded.model))
    assert mx.fast.scaled_dot_product_attention.__module__ == "mlx_turbokv.attention.hook"
