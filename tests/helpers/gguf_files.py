"""Small GGUF files written for tests, from the weights of small mlx-lm models."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 64, 2, 4, 2, 96
HEAD_DIM = HIDDEN // HEADS
LETTERS = [chr(c) for c in range(33, 127)]
TOKENS = ["<|end|>", "<|start|>", *LETTERS, "\u0120", "\u010a", "th", "the"]
MERGES = ["t h", "th e"]

_NAMES = [
    (r"model\.embed_tokens", "token_embd"),
    (r"model\.norm", "output_norm"),
    (r"lm_head", "output"),
    (r"model\.layers\.(\d+)\.input_layernorm", r"blk.\1.attn_norm"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm", r"blk.\1.ffn_norm"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj", r"blk.\1.attn_\2"),
    (r"model\.layers\.(\d+)\.self_attn\.qkv_proj", r"blk.\1.attn_qkv"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj", r"blk.\1.attn_output"),
    (r"model\.layers\.(\d+)\.self_attn\.([qk])_norm", r"blk.\1.attn_\2_norm"),
    (r"model\.layers\.(\d+)\.mlp\.gate_up_proj", r"blk.\1.ffn_up"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj", r"blk.\1.ffn_\2"),
]
_GEMMA3_NAMES = [
    (r"model\.layers\.(\d+)\.post_attention_layernorm", r"blk.\1.post_attention_norm"),
    (r"model\.layers\.(\d+)\.pre_feedforward_layernorm", r"blk.\1.ffn_norm"),
    (r"model\.layers\.(\d+)\.post_feedforward_layernorm", r"blk.\1.post_ffw_norm"),
]
# Two layers, a window of 8 tokens and full attention; what mlx-lm calls it, and GGUF.
GEMMA3 = {
    "sliding_window": 8, "sliding_window_pattern": 2, "rope_local_base_freq": 700.0,
    "query_pre_attn_scalar": HEAD_DIM,
}  # fmt: skip
GEMMA3_FIELDS = {
    "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM,
    "attention.sliding_window": 8, "attention.sliding_window_pattern": 2,
    "rope.freq_base_swa": 700.0,
}  # fmt: skip


def small_model(architecture: str, seed: int = 0, **overrides):
    """An mlx-lm model with random float32 weights, norms and biases included."""
    name = "gemma3_text" if architecture == "gemma3" else architecture
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = {
        "model_type": name,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(TOKENS),
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        **(GEMMA3 if architecture == "gemma3" else {}),
        **overrides,
    }
    model = module.Model(module.ModelArgs.from_dict(config))
    if architecture == "gemma3" and config["tie_word_embeddings"]:
        model.sanitize({})  # weights without an output layer
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.normal(1.0 if "norm" in name else 0.0, 0.2, value.shape).astype(np.float32)
        for name, value in tree_flatten(model.parameters())
    }
    load(model, weights)
    return model, weights


def load(model, weights: dict[str, np.ndarray]) -> None:
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    mx.eval(model.parameters())


def gguf_name(name: str, architecture: str = "llama") -> str:
    path, _, suffix = name.rpartition(".")
    for pattern, replacement in (_GEMMA3_NAMES if architecture == "gemma3" else []) + _NAMES:
        if re.fullmatch(pattern, path):
            return f"{re.sub(pattern, replacement, path)}.{suffix}"
    raise KeyError(name)


def permuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """The order in which llama.cpp's converter stores the rows of Q and K."""
    order = []
    width = rows.shape[0] // n_heads
    for head in range(n_heads):
        for pair in range(width // 2):
            order += [head * width + pair, head * width + pair + width // 2]
    return rows[order]


def write_gguf(
    path: Path,
    architecture: str,
    weights: dict[str, np.ndarray],
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    fields: dict[str, object] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    vocabulary: bool = True,
    context: int = 512,
) -> Path:
    """Write a file; ``kinds`` gives other types than F32 by mlx-lm's name of the tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"small {architecture}")
    writer.add_block_count(LAYERS)
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    if vocabulary:
        add_bpe(writer)
    known = GEMMA3_FIELDS if architecture == "gemma3" else {}
    for key, value in {**known, **(fields or {})}.items():
        add = writer.add_float32 if isinstance(value, float) else (
            writer.add_string if isinstance(value, str) else writer.add_uint32
        )  # fmt: skip
        add(f"{architecture}.{key}", value)
    for name, value in weights.items():
        target = gguf_name(name, architecture)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + 1  # Gemma multiplies by 1 + weight, and GGUF files hold that
        if architecture == "llama" and ".attn_q." in target:
            value = permuted(value, HEADS)
        if architecture == "llama" and ".attn_k." in target:
            value = permuted(value, KV_HEADS)
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        data = gguf.quants.quantize(value, kind)
        writer.add_tensor(target, data, raw_dtype=kind)
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_small_gguf(
    folder: Path,
    architecture: str = "llama",
    edit: Callable[[dict[str, np.ndarray]], object] = lambda weights: None,
    **options,
) -> Path:
    """The file of a small model, whose weights ``edit`` changes first; options of write_gguf."""
    _, weights = small_model(architecture)
    edit(weights)
    return write_gguf(folder / "small.gguf", architecture, weights, **options)


def add_bpe(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)


def logits(model, n_tokens: int = 20) -> np.ndarray:
    tokens = mx.array([[(7 * i + 3) % len(TOKENS) for i in range(n_tokens)]])
    return np.array(model(tokens).astype(mx.float32))
