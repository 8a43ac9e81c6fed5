"""Packed caches in mlx-vlm: generation with an image, batches, and the server's prefix cache."""

from __future__ import annotations

import mlx.core as mx
import pytest
from tiny_vlm import tiny_language_model
from vision_models import (
    WINDOW,
    Batches,
    Whole,
    greedy_answer,
    prompt,
    tiny_gemma3,
    with_image,
)

from mlx_turbokv import TurboKVCache, TurboRotatingKVCache, attach, detach, make_prompt_cache
from mlx_turbokv.cache.base import PackedCache

pytest.importorskip("mlx_vlm", reason="the extra vlm is not installed")
pytestmark = pytest.mark.slow

FORMATS = "turbo4", "turbo3"
N = 8


@pytest.fixture(scope="module")
def model():
    return tiny_gemma3()


@pytest.fixture
def packed(model):
    yield attach(model, *FORMATS)
    detach(model)


@pytest.fixture
def packed_windows(model):
    yield attach(model, *FORMATS, compress_sliding=True)
    detach(model)


def kinds(caches) -> list[str]:
    return [f"{type(c).__module__.split('.')[0]}.{type(c).__name__}" for c in caches]


def image_answer(model, **options) -> list[int]:
    from mlx_vlm.generate.ar import generate_step

    tokens, image, mask = with_image(70)
    steps = generate_step(tokens, model, image, mask, max_tokens=N, temperature=0.0, **options)
    return [int(token) for token, _ in steps]


def text_answer(model, tokens: list[int]) -> list[int]:
    from mlx_vlm.generate.ar import generate_step

    steps = generate_step(mx.array([tokens]), model, None, None, max_tokens=N, temperature=0.0)
    return [int(token) for token, _ in steps]


def test_caches_are_the_language_models(model) -> None:
    from mlx_vlm.models.cache import make_prompt_cache as mlx_vlm_caches

    own = kinds(mlx_vlm_caches(model.language_model))
    assert own == ["mlx_vlm.RotatingKVCache", "mlx_vlm.KVCache"] * 2
    assert attach(model, *FORMATS) is model
    caches = mlx_vlm_caches(model.language_model)
    assert kinds(caches) == ["mlx_vlm.RotatingKVCache", "mlx_turbokv.TurboKVCache"] * 2
    assert kinds(make_prompt_cache(model.language_model)) == kinds(make_prompt_cache(model))
    assert detach(model) is model and "make_cache" not in vars(model.language_model)
    assert kinds(mlx_vlm_caches(model.language_model)) == own


def test_max_kv_size_of_f16_layers_is_mlx_vlms_own_window(model) -> None:
    caches = make_prompt_cache(model, "f16", "f16", max_kv_size=64)
    assert kinds(caches) == ["mlx_vlm.RotatingKVCache"] * 4
    assert [cache.max_size for cache in caches] == [WINDOW, 64, WINDOW, 64]


def test_an_image_is_generated_from_through_the_attached_caches(model) -> None:
    given = make_prompt_cache(model, *FORMATS)
    expected = image_answer(model, prompt_cache=given)
    assert given[1].offset == 70 + N
    attach(model, *FORMATS)
    try:
        assert image_answer(model) == expected
    finally:
        detach(model)


def test_q8_0_answers_as_the_models_own_cache(model) -> None:
    own = image_answer(model)
    assert image_answer(model, prompt_cache=make_prompt_cache(model, "q8_0", "q8_0")) == own


@pytest.mark.parametrize("fixture", ["packed", "packed_windows"])
def test_a_batch_answers_as_each_prompt_alone(fixture, request, monkeypatch) -> None:
    model = request.getfixturevalue(fixture)
    prompts = [prompt(40, 1), prompt(23, 5), prompt(61, 2)]
    alone = [text_answer(model, tokens) for tokens in prompts]
    seen = []
    update = PackedCache.update_and_fetch

    def noting(self, keys, values):
        seen.append((type(self).__name__, keys.shape[0]))
        return update(self, keys, values)

    monkeypatch.setattr(PackedCache, "update_and_fetch", noting)
    assert Batches(model).answers(prompts, N) == alone
    assert ("BatchTurboKVCache", 3) in seen
    assert (("BatchTurboRotatingKVCache", 3) in seen) == (fixture == "packed_windows")


def test_a_request_that_comes_later_joins_the_batch(packed) -> None:
    prompts = [prompt(40, 1), prompt(23, 5)]
    alone = [text_answer(packed, tokens) for tokens in prompts]
    assert Batches(packed).answers(prompts, N, later=3) == alone


@pytest.mark.parametrize("lengths", [[40, 40, 40], [40, 23, 61]])
@pytest.mark.parametrize("later", [0, 3])
def test_batches_of_qwen3_5_whose_padding_the_model_cuts_off_itself(lengths, later) -> None:
    model = tiny_language_model("qwen3_5")
    attach(model, *FORMATS)
    prompts = [prompt(n, first) for n, first in zip(lengths, (1, 5, 2))]
    alone = [greedy_answer(model, tokens, N) for tokens in prompts]
    assert Batches(Whole(model)).answers(prompts, N, later=later) == alone


@pytest.mark.parametrize("fixture", ["packed", "packed_windows"])
def test_the_prefix_cache_keeps_packed_rows_and_answers_as_before(fixture, request) -> None:
    from mlx_vlm.apc import APCManager

    model, tokens = request.getfixturevalue(fixture), prompt(200, 1)
    expected, manager = text_answer(model, tokens), APCManager()
    for hits in range(2):
        assert Batches(model, apc_manager=manager).answers([tokens], N) == [expected]
        assert manager.stats.exact_hits == hits
    (entry, *_) = manager._exact_cache.values()
    window, growing = entry.prompt_cache[:2]
    assert isinstance(growing, TurboKVCache) and growing.size() == len(tokens) - 1
    assert isinstance(window, TurboRotatingKVCache) == (fixture == "packed_windows")


def test_kv_bits_of_batches_is_refused_by_mlx_vlm(packed) -> None:
    with pytest.raises(NotImplementedError, match="TurboKVCache does not support quantized"):
        Batches(packed, kv_bits=4).answers([prompt(20), prompt(30)], 2)
