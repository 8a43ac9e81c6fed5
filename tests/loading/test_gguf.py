"""GGUF files against the gguf package's values and against mlx-lm models of the same weights."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf_files import (
    HEAD_DIM,
    LAYERS,
    gguf_name,
    load,
    logits,
    small_model,
    write_gguf,
    write_small_gguf,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_turbokv.errors import InputError
from mlx_turbokv.loading.gguf.hyperparameters import config_from_gguf
from mlx_turbokv.loading.gguf.model import model_from_gguf
from mlx_turbokv.loading.gguf.reader import GGUFFile, open_gguf
from mlx_turbokv.loading.gguf.repack import BITS, repack

Kind = gguf.GGMLQuantizationType
LOGITS_TOLERANCE = 2e-5  # float32 sums in another order
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma3")


def _same_logits(path, weights, architecture, **overrides):
    model, _ = model_from_gguf(open_gguf(path), packed=False, dtype=mx.float32)
    expected, _ = small_model(architecture, **overrides)
    load(expected, weights)
    want = logits(expected)
    np.testing.assert_allclose(logits(model), want, atol=LOGITS_TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_the_model_built_from_the_same_weights(tmp_path, architecture, tied):
    _, weights = small_model(architecture, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "m.gguf", architecture, weights)
    _same_logits(path, weights, architecture, tie_word_embeddings=tied)


def test_llama_biases_of_q_k_v_alone(tmp_path):
    _, weights = small_model("llama", attention_bias=True)
    weights = {k: np.zeros_like(v) if k.endswith("o_proj.bias") else v for k, v in weights.items()}
    stored = {k: v for k, v in weights.items() if not k.endswith("o_proj.bias")}
    path = write_gguf(tmp_path / "m.gguf", "llama", stored)
    _same_logits(path, weights, "llama", attention_bias=True)


LONG = np.linspace(1, 9, HEAD_DIM // 2, dtype=np.float32)
SHORT = np.linspace(1, 2, HEAD_DIM // 2, dtype=np.float32)
LONGROPE = {"type": "longrope", "long_factor": LONG.tolist(), "short_factor": SHORT.tolist()}


@pytest.mark.parametrize(
    ("architecture", "fields", "tensors", "overrides"),
    [
        (
            "llama",
            {"type": "linear", "factor": 4.0},
            {},
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        (
            "qwen2",
            {"type": "yarn", "factor": 4.0, "original_context_length": 128},
            {},
            {
                "rope_scaling": {
                    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
                },
            },
        ),
        (
            "phi3",
            {"original_context_length": 128},
            {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
            {"rope_scaling": LONGROPE, "original_max_position_embeddings": 128},
        ),
        (
            "gemma3",
            {"type": "linear", "factor": 8.0},
            {},
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
        ),
    ],
    ids=["linear", "yarn", "longrope", "linear in the layers without a window"],
)  # fmt: skip
def test_rope_scaling(tmp_path, architecture, fields, tensors, overrides):
    _, weights = small_model(architecture, **overrides)
    fields = {f"rope.scaling.{key}": value for key, value in fields.items()}
    path = write_gguf(
        tmp_path / "m.gguf", architecture, weights, fields=fields, extra_tensors=tensors
    )
    _same_logits(path, weights, architecture, **overrides)


def test_llama3_factors_are_the_ones_of_mlx_lm(tmp_path):
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model, weights = small_model("llama", rope_scaling=scaling)
    plain = 5000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = (np.array(model.layers[0].self_attn.rope._freqs) / plain).astype(np.float32)
    assert factors.max() > 7  # the long wavelengths are stretched, or this tests nothing
    path = write_small_gguf(tmp_path, extra_tensors={"rope_freqs.weight": factors})
    _same_logits(path, weights, "llama", rope_scaling=scaling)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q5_0, Kind.F16, Kind.BF16])
def test_packed_model_computes_with_the_values_of_the_gguf_package(tmp_path, kind):
    _, weights = small_model("llama")
    matrices = [n for n, v in weights.items() if v.ndim == 2]
    path = write_gguf(tmp_path / "m.gguf", "llama", weights, {n: kind for n in matrices})
    packed, config = model_from_gguf(open_gguf(path), packed=True, dtype=mx.float32)
    assert ("quantization" in config) == (kind.name in BITS)
    decoded = {
        n: gguf.quants.dequantize(gguf.quants.quantize(v, kind), kind) if n in matrices else v
        for n, v in weights.items()
    }
    expected, _ = small_model("llama")
    load(expected, decoded)
    want = logits(expected)
    np.testing.assert_allclose(logits(packed), want, atol=1e-4 * np.abs(want).max())


def _affine(words, scales, biases, bits):
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(words.shape[0], -1, 32, bits) @ (1 << np.arange(bits)).astype(np.float64)
    values = codes * scales.astype(np.float64)[..., None] + biases.astype(np.float64)[..., None]
    return values.reshape(words.shape[0], -1)


@pytest.mark.parametrize("kind", sorted(BITS))
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), blocks=st.integers(1, 3))
def test_repacked_codes_are_the_gguf_package_s_values(kind, seed, rows, blocks):
    block, block_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    n_scales = 1 if kind in ("Q4_0", "Q5_0", "Q8_0") else 2
    halves = rng.normal(0, 0.1, (rows, blocks, n_scales)).astype(np.float16)
    raw[..., : 2 * n_scales] = halves.view(np.uint8)
    raw = raw.reshape(rows, -1)
    want = gguf.quants.dequantize(raw, Kind[kind]).astype(np.float64)
    got = _affine(*repack(raw, kind, np.float32), BITS[kind])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q5_1, Kind.Q8_0])
def test_repacked_words_are_read_so_by_mlx(kind):
    rng = np.random.default_rng(3)
    raw = gguf.quants.quantize(rng.normal(size=(4, 64)).astype(np.float32), kind)
    words, scales, biases = (mx.array(x) for x in repack(raw, kind.name, np.float32))
    got = np.array(mx.dequantize(words, scales, biases, group_size=32, bits=BITS[kind.name]))
    np.testing.assert_allclose(got, gguf.quants.dequantize(raw, kind), atol=1e-6)


def test_config_carries_the_hyperparameters(tmp_path):
    config = config_from_gguf(open_gguf(write_small_gguf(tmp_path, "qwen3")))
    assert config["num_hidden_layers"] == LAYERS
    assert config["rope_theta"] == 5000.0
    assert config["tie_word_embeddings"] is False
    assert config["max_position_embeddings"] == 512


def test_unknown_architecture(tmp_path):
    _, weights = small_model("llama")
    path = write_gguf(tmp_path / "m.gguf", "gptneox", weights)
    with pytest.raises(InputError, match="'gptneox'; accepted are llama.*, gemma3"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention.sliding_window_pattern": 3}, "has 2 layers; one in 3"),
        ({"final_logit_softcapping": 30.0}, "has final_logit_softcapping"),
        ({"attention.sliding_window": 0}, "gemma3.attention.sliding_window"),
        ({"rope.freq_base_swa": 0.0}, "gemma3.rope.freq_base_swa"),
    ],
)
def test_a_gemma_that_mlx_lm_has_not(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        config_from_gguf(open_gguf(write_small_gguf(tmp_path, "gemma3", fields=fields)))


def test_the_queries_scale_of_the_largest_gemma_is_of_its_width():
    """62 layers, 5376 wide, 32 heads of 128: 1 / sqrt(168), as google/gemma-3-27b-it says."""
    fields = {"attention.sliding_window": 1024, "embedding_length": 5376, "block_count": 62}
    fields |= {"attention.head_count": 32, "attention.key_length": 128, "feed_forward_length": 1}
    fields |= {"attention.layer_norm_rms_epsilon": 1e-6, "context_length": 131072}
    metadata = {f"gemma3.{key}": value for key, value in fields.items()}
    metadata["general.architecture"] = "gemma3"
    embedding = SimpleNamespace(shape=np.array([5376, 7]))
    names = {f"blk.{i}.attn_norm.weight": embedding for i in range(62)}
    file = GGUFFile([Path("m.gguf")], metadata, {"token_embd.weight": embedding, **names})
    assert config_from_gguf(file)["query_pre_attn_scalar"] == 168


def test_gemma_generates_past_its_window_as_mlx_lm_does(tmp_path):
    _, weights = small_model("gemma3", tie_word_embeddings=True)
    file = open_gguf(write_gguf(tmp_path / "m.gguf", "gemma3", weights))
    model, _ = model_from_gguf(file, dtype=mx.float32)
    expected, _ = small_model("gemma3", tie_word_embeddings=True)
    prompt = mx.array([3, 1, 4, 1, 5])

    def greedy(model):
        steps = generate_step(prompt, model, max_tokens=30, prompt_cache=make_prompt_cache(model))
        return [token for token, _ in steps]

    assert greedy(model) == greedy(expected)
    assert model_from_gguf(file)[0].model.norm.weight.dtype == mx.bfloat16


UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "tensors", "message"),
    [
        (lambda w: w.pop(UP_PROJ), {}, f"lacks {UP_PROJ}"),
        (lambda w: w.update({UP_PROJ: np.ones((8, 64), np.float32)}), {}, "up_proj"),
        (lambda w: None, {"blk.0.ffn_gate_inp.weight": np.ones((4, 4), "f4")}, "ffn_gate_inp"),
        (
            lambda w: w.pop("model.norm.weight"),
            {"output_norm.weight": np.ones(64, np.int32)},
            "output_norm.weight .* has the type I32",
        ),
    ],
    ids=["missing", "of another shape", "too many", "of another type"],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, edit, tensors, message):
    path = write_small_gguf(tmp_path, edit=edit, extra_tensors=tensors)
    with pytest.raises(InputError, match=message):
        model_from_gguf(open_gguf(path))


def test_a_type_that_the_gguf_package_does_not_know(tmp_path):
    path = write_small_gguf(tmp_path)
    data = bytearray(path.read_bytes())
    name = gguf_name("model.norm.weight").encode()
    kind_at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 8
    data[kind_at : kind_at + 4] = struct.pack("<I", 999)
    path.write_bytes(data)
    with pytest.raises(InputError, match="unknown type 999"):
        open_gguf(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no GGUF file at"):
        open_gguf(tmp_path / "absent.gguf")


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a GGUF file"):
            open_gguf(path)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return write_small_gguf(tmp_path_factory.mktemp("gguf"))


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_every_truncation_is_one_clear_error(intact, share):
    data, cut = intact.read_bytes(), intact.with_name("cut.gguf")
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError):
        open_gguf(cut)


@settings(deadline=None, max_examples=60)
@given(at=st.floats(0, 1), value=st.integers(0, 255))
def test_a_changed_header_byte_opens_or_is_a_clear_error(intact, at, value):
    data, damaged = bytearray(intact.read_bytes()), intact.with_name("damaged.gguf")
    data[int(at * 1500)] = value
    damaged.write_bytes(data)
    with contextlib.suppress(InputError):
        open_gguf(damaged)
