"""Trained GGUF files: llama.cpp's tokens and loss, and mlx-lm's model of the same weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf_files import gguf_name
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.gemma3_text import Model, ModelArgs
from mlx_lm.utils import load_model
from trained_models import trained_model

from mlx_turbokv.loading import models

pytestmark = pytest.mark.slow

# config.json of google/gemma-3-270m
GEMMA_CONFIG = {
    "model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18,
    "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "rms_norm_eps": 1e-6, "vocab_size": 262144, "max_position_embeddings": 32768,
    "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "query_pre_attn_scalar": 256,
    "sliding_window": 512, "sliding_window_pattern": 6,
}  # fmt: skip
# Ids of llama.cpp (node-llama-cpp 3.21.1) and of the tokenizer.json of Gemma 3, which agree.
IDS = {
    "The capital of France is": [818, 5279, 529, 7001, 563],
    "Hello  world\n\n\tif x == 1:    return": [
        9259, 138, 12392, 108, 255968, 584, 1123, 1251, 236743, 236770, 236787, 140, 2060,
    ],
    "I can't   believe 12345 \u00e9\u4e2d\u6587 <b>bold</b> \U0001f600": [
        236777, 740, 236789, 236745, 139, 123232, 236743, 236770, 236778, 236800, 236812, 236810,
        1559, 55041, 236743, 200, 15640, 209, 163543,
    ],
}  # fmt: skip
TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is "
    "named after the engineer Gustave Eiffel, whose company designed and built the tower from 1887 "
    "to 1889."
)
# Of the tokens of TEXT after BOS, by llama.cpp on the same file (CPU, node-llama-cpp 3.21.1), which
# rounds activations to 8 bits.
LLAMA_CPP_LOSS = 1.8786
LOSS_TOLERANCE = 0.02
BOS = 2


@pytest.fixture(scope="module")
def gemma():
    return models.load(trained_model("gemma"), dtype=mx.float32, packed=False)


def gemma_folder(path: Path, folder: Path) -> Path:
    """The file's values as mlx-lm keeps a model, without the package's reader."""
    reader = gguf.GGUFReader(path)
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    model = Model(ModelArgs.from_dict(GEMMA_CONFIG))
    model.sanitize({})
    weights = {}
    for name, parameter in tree_flatten(model.parameters()):
        value = values.pop(gguf_name(name, "gemma3")).reshape(parameter.shape)
        weights[name] = mx.array(value - 1 if re.search(r"norm\.weight$", name) else value)
    assert not values
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(GEMMA_CONFIG))
    return folder


def greedy(model, prompt: list[int], n: int) -> list[int]:
    steps = generate_step(
        mx.array(prompt), model, max_tokens=n, prompt_cache=make_prompt_cache(model)
    )
    return [token for token, _ in steps]


def test_gemma_ids_are_those_of_llama_cpp(gemma):
    for text, ids in IDS.items():
        assert gemma.tokenizer.encode(text) == [BOS, *ids]
        assert gemma.tokenizer.decode(ids) == text
        detokenizer = gemma.tokenizer.detokenizer
        detokenizer.reset()
        for token in ids:
            detokenizer.add_token(token)
        detokenizer.finalize()
        assert detokenizer.text == text
    assert gemma.tokenizer.eos_token_ids == {1, 106}


def test_gemma_s_greedy_text_is_mlx_lm_s_on_the_same_weights(gemma, tmp_path):
    expected, _ = load_model(gemma_folder(trained_model("gemma"), tmp_path))
    prompt = gemma.tokenizer.encode("Once upon a time")
    tokens = greedy(gemma.model, prompt, 24)
    assert tokens == greedy(expected, prompt, 24)
    text = gemma.tokenizer.decode(tokens)
    assert text.startswith(", there was a little girl named Lily. She was a very smart girl")
    long = mx.array([gemma.tokenizer.encode(TEXT * 16)])[:, :600]  # past the window of 512
    want = np.array(expected(long)[:, -8:])
    np.testing.assert_allclose(gemma.model(long)[:, -8:], want, atol=1e-4 * np.abs(want).max())


def test_gemma_s_loss_is_llama_cpp_s(gemma):
    ids = gemma.tokenizer.encode(TEXT)
    logits = gemma.model(mx.array([ids[:-1]]))[0]
    targets = mx.array(ids[1:])
    loss = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], 1)[:, 0]
    assert loss.mean().item() == pytest.approx(LLAMA_CPP_LOSS, abs=LOSS_TOLERANCE)


def test_gemma_s_packed_weights_are_the_same_values(gemma):
    packed = models.load(trained_model("gemma"), dtype=mx.float32, packed=True)
    assert packed.model.layers[0].mlp.gate_proj.bits == 5
    assert packed.model.model.embed_tokens.bits == 8
    ids = mx.array([gemma.tokenizer.encode(TEXT)])
    want = np.array(gemma.model(ids))
    np.testing.assert_allclose(packed.model(ids), want, atol=1e-3 * np.abs(want).max())


def test_qwen_answers():
    loaded = models.load(trained_model("qwen"))
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? One word."}],
        add_generation_prompt=True,
    )
    assert loaded.tokenizer.decode(greedy(loaded.model, prompt, 1)) == "Paris"
