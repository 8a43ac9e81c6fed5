"""Finding KV layers, attaching and detaching."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_make_prompt_cache
from tiny_models import tiny_model

from mlx_turbokv import TurboKVCache, attach, detach, log, make_prompt_cache
from mlx_turbokv.errors import InputError
from mlx_turbokv.model.kv_layers import kv_layers
from mlx_turbokv.model.probing import record_one_token
from mlx_turbokv.model.shapes import KVShape
from mlx_turbokv.policy import LayerList
from mlx_turbokv.policy.files import write_layer_list


def kinds(caches: list) -> list[str]:
    return [type(cache).__name__ for cache in caches]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the package told the user."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(log, "_given", set())
    monkeypatch.setattr(log.logger, "handlers", [handler])
    return lines


def test_shapes_are_learnt_without_computing() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    # a weight that cannot be computed: evaluating it raises
    model.model.layers[0].self_attn.k_proj.weight = mx.zeros((64, 128)) + _poison((64, 128))
    layers = kv_layers(model)
    recorded = record_one_token(model, layers.positions)
    assert {position: cache.shape for position, cache in recorded.items()} == {
        (0, None): KVShape(2, 32, 32),
        (1, None): KVShape(2, 32, 32),
    }
    assert [layer.shape for layer in layers.layers] == [KVShape(2, 32, 32)] * 2


def _poison(shape: tuple[int, int]) -> mx.array:
    """A lazy array far too large to be made."""
    huge = mx.zeros((1 << 20, 1 << 20, 1 << 10), mx.float32)
    return mx.broadcast_to(huge.sum() + mx.zeros(()), shape)


def test_k_and_v_head_dims_may_differ() -> None:
    (first, *_) = kv_layers(tiny_model("deepseek_v2")).layers
    assert first.shape == KVShape(4, 48, 32)


def test_notes_name_layers_by_reason() -> None:
    notes = kv_layers(tiny_model("gear")).notes()
    assert notes == [
        "Not compressed: layers 1, 4, 7 (sliding window of 16 tokens).",
        "Not compressed: layers 2, 5, 8 (recurrent state).",
    ]
    assert kv_layers(tiny_model("deepseek_v3")).notes() == [
        "Not compressed: layers 0-2 (MLA latent)."
    ]


class Mixed(nn.Module):
    """MLA in the second of three layers, with caches for every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.Module(), nn.Linear(8, 8)]
        self.layers[1].attention = nn.Module()
        self.layers[1].attention.embed_q = nn.Linear(8, 8)
        self.layers[1].attention.unembed_out = nn.Linear(8, 8)


def test_latent_attention_is_found_layer_by_layer() -> None:
    model = Mixed()
    assert [layer.index for layer in kv_layers(model).layers] == [0, 2]


def test_latent_attention_in_a_list_of_another_length_leaves_all_alone() -> None:
    model = Mixed()
    model.make_cache = lambda: [KVCache() for _ in range(4)]
    found = kv_layers(model)
    assert found.layers == []
    assert {entry.reason for entry in found.skipped} == {"MLA latent"}


def test_pipeline_ranks_count_over_the_whole_model() -> None:
    model = tiny_model("qwen3_5", num_hidden_layers=12)
    v = {}
    for rank in range(2):
        part = copy.deepcopy(model)
        attach(part, policy="la-v7")  # attached before the split, as a command would
        part.language_model.model.pipeline(_Group(rank, 2))
        caches = part.make_cache()
        assert len(caches) == 6
        found = kv_layers(part)
        assert found.n_total == 6
        assert [layer.index for layer in found.layers] == [1, 3, 5]
        again = make_prompt_cache(part, policy="la-v7")
        v[rank] = [str(cache.v_format) for cache in caches if isinstance(cache, TurboKVCache)]
        assert v[rank] == [str(c.v_format) for c in again if isinstance(c, TurboKVCache)]
    # mlx-lm gives rank 0 the last layers
    assert v[1] == ["q8_0", "q8_0", "turbo2"]
    assert v[0] == ["turbo2", "q8_0", "q8_0"]


def test_a_model_may_be_its_own_language_model() -> None:
    model = tiny_model("llama")
    type_of_it = type("Whole", (type(model),), {"language_model": property(lambda self: self)})
    object.__setattr__(model, "__class__", type_of_it)
    assert [layer.index for layer in kv_layers(model).layers] == [0, 1, 2]


class _Group(SimpleNamespace):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank=lambda: rank, size=lambda: size)


def test_attach_reaches_mlx_lm_and_detach_restores_the_class_factory() -> None:
    model = tiny_model("gemma3_text")
    before = dict(vars(model))
    own = kinds(mlx_lm_make_prompt_cache(model))
    attach(model, "q8_0", "turbo3")
    packed = mlx_lm_make_prompt_cache(model)
    assert kinds(packed) == ["RotatingKVCache", "TurboKVCache"] * 3
    assert str(packed[1].v_format) == "turbo3"
    detach(model)
    assert vars(model) == before
    assert kinds(mlx_lm_make_prompt_cache(model)) == own


def test_detach_restores_an_instance_factory_and_a_model_without_one() -> None:
    model = tiny_model("qwen3")  # its class has no make_cache
    assert not hasattr(model, "make_cache")
    detach(attach(model))
    assert not hasattr(model, "make_cache")

    def mine() -> list:
        return [KVCache(), RotatingKVCache(max_size=8), KVCache()]

    model.make_cache = mine
    attach(attach(model))
    assert kinds(model.make_cache()) == ["TurboKVCache", "RotatingKVCache", "TurboKVCache"]
    detach(model)
    assert model.make_cache is mine
    detach(model)
    assert model.make_cache is mine


def test_attaching_again_replaces() -> None:
    model = attach(attach(tiny_model("llama"), "q8_0", "turbo2"), "turbo4", "f16")
    assert {(str(c.k_format), str(c.v_format)) for c in model.make_cache()} == {("turbo4", "f16")}
    assert kinds(make_prompt_cache(model, "q8_0", "q8_0")) == ["TurboKVCache"] * 3


def test_layers_of_f16_alone_keep_mlx_lms_cache() -> None:
    policy = LayerList((("f16", "f16"), ("q8_0", "f16"), ("f16", "f16")))
    caches = make_prompt_cache(tiny_model("llama"), policy=policy)
    assert kinds(caches) == ["KVCache", "TurboKVCache", "KVCache"]


def test_a_deep_copy_of_an_attached_model_makes_its_own_caches() -> None:
    model = copy.deepcopy(attach(tiny_model("llama")))
    assert model.make_cache.model is model
    assert kinds(model.make_cache()) == ["TurboKVCache"] * 3


def test_notes_are_said_once(said: list[str]) -> None:
    model = tiny_model("lfm2")
    for _ in range(3):
        attach(model, policy="la-v7")
        model.make_cache()
    assert said == [
        "Policy la-v7 protects 4 KV layers, and this model has 3: every layer is a boundary layer.",
        "Not compressed: layers 0, 2, 4 (recurrent state).",
    ]


def test_a_head_dim_that_cannot_be_rotated_is_refused_before_generation() -> None:
    model = tiny_model("llama", head_dim=88)
    with pytest.raises(InputError, match="head_dim 88 cannot be rotated"):
        attach(model, "q8_0", "turbo2")
    assert "make_cache" not in vars(model)
    assert kinds(make_prompt_cache(model, "q8_0", "q8_0")) == ["TurboKVCache"] * 3


def test_bad_arguments_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="boundary|Boundary"):
        attach(model, policy="boundary:2,2")
    with pytest.raises(InputError, match="turbo9"):
        attach(model, v="turbo9")
    with pytest.raises(InputError, match="back-end 'opencl'"):
        attach(model, backend="opencl")
    assert "make_cache" not in vars(model)
    with pytest.raises(InputError, match="policy 7 is not accepted"):
        attach(model, policy=7)


def test_a_policy_file_may_be_a_path(tmp_path) -> None:
    write_layer_list(tmp_path / "mine.json", [("q8_0", "turbo2"), ("f16", "f16"), ("f16", "q8_0")])
    caches = make_prompt_cache(tiny_model("llama"), policy=tmp_path / "mine.json")
    assert kinds(caches) == ["TurboKVCache", "KVCache", "TurboKVCache"]


def test_generation_uses_the_attached_caches() -> None:
    model = tiny_model("qwen3_5")
    prompt = mx.array([5, 11, 2, 3, 7, 1, 60])
    made = make_prompt_cache(model, "q8_0", "turbo4")
    given = [token for token, _ in generate_step(prompt, model, max_tokens=8, prompt_cache=made)]
    attach(model, "q8_0", "turbo4")
    assert [token for token, _ in generate_step(prompt, model, max_tokens=8)] == given


def test_batch_generation_uses_the_attached_caches() -> None:
    class Tokenizer:
        eos_token_ids = {-1}
        detokenizer = None

        def decode(self, tokens: list[int]) -> str:
            return " ".join(map(str, tokens))

    model = attach(tiny_model("llama"), "q8_0", "turbo4")
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7, 1]]
    texts = batch_generate(model, Tokenizer(), prompts, max_tokens=6).texts
    for prompt, text in zip(prompts, texts):
        alone = [t for t, _ in generate_step(mx.array(prompt), model, max_tokens=6)]
        assert text == " ".join(map(str, alone))
