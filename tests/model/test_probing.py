"""Probing a model: what fails is logged, and nothing is left behind."""

from __future__ import annotations

import logging
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache
from varied_models import varied_model

from mlx_turbokv import log
from mlx_turbokv.centring.bias import key_biases
from mlx_turbokv.centring.rope import find_rope_frequencies, recorded_rope
from mlx_turbokv.model.kv_layers import kv_layers
from mlx_turbokv.model.probing import only_forwards_kv, record_one_token


class Refusing(nn.Module):
    """A model that needs more than tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Module()]

    def __call__(self, tokens: mx.array, cache: list) -> mx.array:
        raise KeyError("image_features")

    def make_cache(self) -> list:
        return [KVCache()]


@pytest.mark.parametrize(
    "probe",
    [
        lambda model: record_one_token(model, [(0, None)]),
        lambda model: only_forwards_kv(model, [KVCache()]),
        lambda model: kv_layers(model),
    ],
    ids=["shapes", "forwards", "layers"],
)
def test_a_model_that_cannot_be_called_is_logged(probe, caplog) -> None:
    log._given.clear()
    with caplog.at_level(logging.INFO, logger="mlx_turbokv"):
        probe(Refusing())
    assert "KeyError: 'image_features'" in caplog.text and "Refusing" in caplog.text


def test_attention_that_cannot_be_called_alone_is_logged(monkeypatch, caplog) -> None:
    model = varied_model("llama")
    layers = kv_layers(model).layers
    attention = type(model.layers[0].self_attn)
    monkeypatch.setattr(attention, "__call__", lambda self, *a, **k: 1 / 0)
    log._given.clear()
    with caplog.at_level(logging.INFO, logger="mlx_turbokv"):
        assert key_biases(model, layers) == {}
    assert "ZeroDivisionError" in caplog.text and attention.__name__ in caplog.text


def test_rope_is_itself_again_however_threads_meet() -> None:
    """Two threads look at models at the same time, the one that began first ends last."""
    own = mx.fast.rope
    models = [varied_model("llama") for _ in range(2)]
    layers = [kv_layers(model).layers for model in models]
    found: list = []

    def look(i: int) -> None:
        for _ in range(8):
            found.append(find_rope_frequencies(models[i], layers[i]))

    threads = [threading.Thread(target=look, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mx.fast.rope is own
    assert len(found) == 16 and all(x == found[0] and len(x) == len(layers[0]) for x in found)


def test_calls_of_other_threads_are_not_recorded() -> None:
    x = mx.zeros((1, 1, 1, 8))
    options = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 3}
    with recorded_rope() as calls:
        results = []
        thread = threading.Thread(target=lambda: results.append(mx.fast.rope(x, 8, **options)))
        thread.start()
        thread.join()
        assert results[0].shape == x.shape and calls.calls == []
        mx.fast.rope(x, 8, **options)
        assert len(calls.calls) == 1


def test_norms_are_not_taken_for_attention(caplog) -> None:
    """`post_attention_layernorm` has a name like attention's."""
    log._given.clear()
    model = varied_model("llama")
    with caplog.at_level(logging.INFO, logger="mlx_turbokv"):
        key_biases(model, kv_layers(model).layers)
    assert caplog.text == ""
