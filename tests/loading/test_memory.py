"""What a model is expected to take, against what it takes."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_model

from mlx_turbokv import attach
from mlx_turbokv.loading import memory
from mlx_turbokv.loading.memory import ROUND, Footprint

MODELS = ["llama", "qwen3_5", "gemma3_text", "falcon_h1", "llama4_text"]
STEP = 64


def attached(name: str, k: str = "q8_0", v: str = "turbo3", sliding: bool = False):
    model = tiny_model(name, max_position_embeddings=4096)
    mx.eval(model.parameters())
    return attach(model, k, v, backend="reference", compress_sliding=sliding)


def read(model, n: int) -> list:
    caches = make_prompt_cache(model)
    for start in range(0, n, STEP):
        model(mx.zeros((1, min(STEP, n - start)), mx.int32), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


@pytest.mark.parametrize(
    ("name", "sliding"), [*((name, False) for name in MODELS), ("gemma3_text", True)]
)
def test_caches_take_what_is_expected(name: str, sliding: bool) -> None:
    model = attached(name, sliding=sliding)
    footprint = Footprint([model], STEP)
    assert footprint.is_known
    for n in (1, 513):
        held = sum(cache.nbytes for cache in read(model, n))
        assert held <= footprint.caches(n)
        more = sum(cache.nbytes for cache in read(model, n + ROUND))
        assert footprint.caches(n) <= (2 if name == "gemma3_text" else 1) * more  # tiny windows


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(1, 700),
    formats=st.sampled_from([("f16", "f16"), ("turbo4", "turbo2"), ("q8_0", "turbo3")]),
)
def test_reading_a_prompt_takes_no_more_than_expected(n: int, formats: tuple[str, str]) -> None:
    model = attached("llama", *formats)
    footprint = Footprint([model], STEP)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    caches = read(model, n)
    assert mx.get_peak_memory() - before <= footprint.caches(n) + footprint.scratch(n)
    assert caches


def test_nothing_is_computed_for_an_estimate() -> None:
    model = attached("llama")
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert Footprint([model], 2048).caches(1_000_000) > 10_000_000
    assert mx.get_peak_memory() - before < 100_000


def test_weights_are_counted_once_and_of_all_models() -> None:
    model, draft = attached("llama"), attached("llama")
    one = Footprint([model], STEP)
    assert Footprint([model, draft], STEP).weights == 2 * one.weights
    assert Footprint([model, draft], STEP).caches(500) == 2 * one.caches(500)


def test_warning_has_the_numbers() -> None:
    footprint = Footprint([attached("llama")], STEP)
    assert memory.warning(footprint, 1000, limit=1 << 40) is None
    text = memory.warning(footprint, 1000, limit=1_000_000)
    assert text is not None and "1,000 tokens" in text and "there are 1.00 MB" in text
    assert memory.gigabytes(footprint.caches(1000)) in text
    assert memory.warning(footprint, 1000, limit=0) is None


def test_the_machine_has_a_limit() -> None:
    assert 1 << 28 < memory.default_limit() < 1 << 50
