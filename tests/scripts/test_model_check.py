"""The GPU check's comparison of texts: rounding passes, and nothing else does."""

from __future__ import annotations

import mlx.core as mx
import model_check
import numpy as np
import pytest
from model_check import FORCED_TIE, MOST_DIFFERING, forced_failures, forced_text
from teacher_forced import TeacherForcedCache
from varied_models import varied_model

from mlx_turbokv import TurboKVCache, make_prompt_cache
from mlx_turbokv.kernels.backend import REFERENCE, Backend

pytestmark = pytest.mark.slow

N = 40
PROMPT = np.random.default_rng(0).integers(0, 90, 230).tolist()  # the tail is flushed on the way


@pytest.fixture(scope="module")
def model():
    return varied_model("llama", num_hidden_layers=4)


def through(backend: Backend) -> type[TurboKVCache]:
    """A cache class that packs and reads with this back-end."""
    return type("Cache", (TurboKVCache,), {"backend": property(lambda self: backend)})


def noisy(size: float) -> Backend:
    """The reference with attention off by a relative error of this size."""

    def attention(*args, **options):
        output = REFERENCE.attention(*args, **options)
        return output * (1 + size * mx.random.normal(output.shape))

    mx.random.seed(0)
    return REFERENCE._replace(attention=attention)


def compared(model, pair, backend: Backend, n: int = N) -> dict:
    first = [through(backend)(*pair) for _ in model.layers]
    return forced_text(model, PROMPT, first, [TeacherForcedCache(c, "reference") for c in first], n)


def n_codes(model, n: int) -> int:
    """Codes of n tokens in all layers, from the model's own shape."""
    args = model.args
    return 2 * n * len(model.layers) * args.num_key_value_heads * args.head_dim


@pytest.mark.parametrize("pair", model_check.PAIRS)
def test_a_back_end_agrees_with_itself_to_the_bit(model, pair):
    forced = compared(model, pair, REFERENCE)
    assert forced == {
        "n_tokens": N,
        "n_equal": N,
        "different": [],
        "gap": None,
        "log_probability": 0.0,
        "codes": n_codes(model, len(PROMPT) + N - 1),
        "differing": 0,
        "wrong": 0,
    }
    assert forced_failures(forced) == []


@pytest.mark.parametrize("pair", model_check.PAIRS)
def test_rounding_changes_codes_and_only_free_texts(model, pair, monkeypatch):
    backends = {"noisy": noisy(3e-5), "reference": REFERENCE}
    prompts = [PROMPT, PROMPT[1:], PROMPT[2:]]

    def caches(model, *pair, backend, **unprotected):
        return [through(backends[backend])(*pair) for _ in model.layers]

    class Words:
        @staticmethod
        def encode(text):
            return prompts[int(text)]

    monkeypatch.setattr(model_check, "make_prompt_cache", caches)
    monkeypatch.setattr(model_check, "PROMPTS", ("0", "1", "2"))
    monkeypatch.setattr(model_check, "N_TOKENS", N)
    texts, failures = model_check.compare_texts(model, Words, pair, tuple(backends))
    assert failures == []
    for text in texts:
        forced = text["forced"]
        assert (forced["n_equal"], forced["gap"], forced["wrong"]) == (N, None, 0)
        assert forced["log_probability"] > 0
    assert sum(text["forced"]["differing"] for text in texts) > 0
    gaps = [text["free"]["gap"] for text in texts if text["free"]["gap"] is not None]
    assert max(np.abs(gaps)) > FORCED_TIE


@pytest.mark.parametrize("pair", model_check.PAIRS)
def test_one_changed_code_a_layer_is_wrong(model, pair):
    def pack(*args, **options):
        tiles = REFERENCE.pack(*args, **options)
        if args[0].shape[2] == 1:
            return tiles
        return tiles ^ mx.array([1 << 5] + [0] * (tiles.size - 1), mx.uint32).reshape(tiles.shape)

    forced = compared(model, pair, REFERENCE._replace(pack=pack), n=2)
    assert forced["differing"] == len(model.layers)
    assert forced["wrong"] >= len(model.layers)
    assert any("no near-ties" in failure for failure in forced_failures(forced))


def test_decode_without_the_newest_row_fails(model):
    """In the last layer, after which no code depends on it: tokens alone show it."""

    def attention(queries, packed, *args, **options):
        if queries.shape[2] == 1 and packed.n_tail > 1:
            packed = packed._replace(n_tail=packed.n_tail - 1)
        return REFERENCE.attention(queries, packed, *args, **options)

    pair = model_check.PAIRS[0]
    first = make_prompt_cache(model, *pair, backend="reference", sink=0, recent=0)
    first[-1] = through(REFERENCE._replace(attention=attention))(*pair)
    second = [TeacherForcedCache(cache, "reference") for cache in first]
    forced = forced_text(model, PROMPT, first, second, N)
    assert (forced["differing"], forced["wrong"]) == (0, 0)
    assert forced["gap"] == max(step["gap"] for step in forced["different"])
    assert forced["n_equal"] == N - len(forced["different"])
    failures = forced_failures(forced)
    assert any("choices part at step" in failure for failure in failures)
    assert any("log-probability" in failure for failure in failures)


def test_an_error_of_a_thousandth_in_attention_is_wrong(model):
    forced = compared(model, model_check.PAIRS[1], noisy(1e-3))
    assert forced["wrong"] > 0
    assert forced["differing"] > MOST_DIFFERING * forced["codes"]
    assert len(forced_failures(forced)) >= 2


@pytest.mark.parametrize(
    ("changes", "n_failures"),
    [
        ({}, 0),
        ({"different": [{"step": 3, "gap": 0.9 * FORCED_TIE}]}, 0),
        ({"different": [{"step": 3, "gap": 1.1 * FORCED_TIE}]}, 1),
        ({"different": [{"step": 3, "gap": float("nan")}]}, 1),
        ({"log_probability": float("nan")}, 1),
        ({"differing": 9}, 0),
        ({"differing": 11}, 1),
        ({"wrong": 1}, 1),
    ],
)
def test_what_fails(changes, n_failures):
    forced = {"different": [], "log_probability": 1e-4, "codes": 10_000, "differing": 0, "wrong": 0}
    assert len(forced_failures({**forced, **changes})) == n_failures
