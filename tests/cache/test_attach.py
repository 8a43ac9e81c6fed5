"""What `attach` leaves in a model: no cycle, no bet on what reads K and V later."""

from __future__ import annotations

import copy
import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import base
from tiny_models import tiny_model
from varied_models import varied_model

from mlx_turbokv import InputError, TurboKVCache, attach, make_prompt_cache
from mlx_turbokv.attention.arrays import Handle
from mlx_turbokv.attention.hook import AttentionFunctions

TOKEN = mx.zeros((1, 1), mx.int32)


@pytest.mark.parametrize("kind", ["uniform", "keys"])
def test_a_dropped_model_is_freed_at_once(kind: str) -> None:
    model = varied_model("llama")
    attach(model, "turbo4", "turbo3") if kind == "keys" else attach(model)
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_a_deep_copy_makes_caches_of_its_own_model() -> None:
    model = attach(varied_model("llama"), "q8_0", "turbo3")
    twin = copy.deepcopy(model)
    assert twin.make_cache.model is twin and model.make_cache.model is model
    del model
    caches = twin.make_cache()
    assert all(isinstance(cache, TurboKVCache) for cache in caches)
    twin(TOKEN, cache=caches)


@pytest.mark.parametrize("given", ["mlx-community/some-model", (1, 2), None])
def test_what_is_no_model_is_refused(given) -> None:
    for function in (attach, make_prompt_cache):
        with pytest.raises(InputError, match="one that mlx_lm.load or mlx_vlm.load returns"):
            function(given)


def test_a_loaded_pair_is_refused_by_what_to_give() -> None:
    with pytest.raises(InputError, match="without its tokenizer"):
        attach((tiny_model("llama"), object()))


def ready(model) -> list:
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 3), mx.int32), cache=caches)
    return caches


def one_token_gives(caches: list) -> set[type]:
    cache = caches[0]
    shape = cache.packed.newest.shape
    layout = cache.layout
    keys = mx.zeros((shape[0], shape[1], 1, layout.k_head_dim))
    values = mx.zeros((shape[0], shape[1], 1, layout.v_head_dim))
    return {type(x) for x in cache.update_and_fetch(keys, values)}


def test_models_that_only_forward_k_and_v_get_handles() -> None:
    assert one_token_gives(ready(varied_model("llama"))) == {Handle}


def test_attention_that_was_replaced_later_gets_arrays(monkeypatch) -> None:
    caches = ready(varied_model("llama"))
    with monkeypatch.context() as patch:
        own = mx.fast.scaled_dot_product_attention
        patch.setattr(mx.fast, "scaled_dot_product_attention", lambda *a, **k: own(*a, **k))
        assert Handle not in one_token_gives(caches)
    with monkeypatch.context() as patch:
        patch.setattr(base, "scaled_dot_product_attention", lambda *a, **k: None)
        assert Handle not in one_token_gives(caches)
    assert one_token_gives(caches) == {Handle}


def test_a_model_whose_module_has_another_attention_gets_arrays(monkeypatch) -> None:
    import mlx_lm.models.llama as module

    caches = ready(varied_model("llama"))
    monkeypatch.setattr(module, "scaled_dot_product_attention", lambda *a, **k: None)
    assert Handle not in one_token_gives(caches)


def test_a_cache_that_is_wrapped_gives_arrays() -> None:
    caches = ready(varied_model("llama"))
    own = caches[0].update_and_fetch
    seen = []

    def wrapper(keys, values):
        result = own(keys, values)
        seen.append(type(result[0]))
        return result

    caches[0].update_and_fetch = wrapper
    assert Handle not in one_token_gives(caches) and Handle not in seen

    class Counting(TurboKVCache):
        def update_and_fetch(self, keys, values):
            keys, values = super().update_and_fetch(keys, values)
            return keys + 0, values + 0

    cache = Counting("q8_0", "turbo3")
    cache.handles = AttentionFunctions(nn.Module())
    rows = mx.zeros((1, 2, 1, 64))
    assert {type(x) for x in cache.update_and_fetch(rows, rows)} == {mx.array}


def test_arrays_can_be_asked_for() -> None:
    model = varied_model("llama")
    caches = make_prompt_cache(model, handles=False)
    model(TOKEN, cache=caches)
    assert Handle not in one_token_gives(caches)
