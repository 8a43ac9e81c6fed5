"""The configuration of a GGUF file's model, made from its metadata and checked with its tensors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ...errors import InputError, short
from .reader import GGUFFile

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LAYER = re.compile(r"blk\.(\d{1,6})\.", re.ASCII)
# Facts about Gemma 3 that its GGUF files leave to the program that reads them.
_GEMMA3_PATTERN = 6  # every sixth layer attends to all tokens
_GEMMA3_LOCAL_BASE = 10_000.0
_GEMMA3_27B_LAYERS = 62  # the one size whose queries are not scaled by head_dim


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """The file's hyperparameters under the names of mlx-lm's (and Hugging Face's) config.json.

    Raises:
        InputError: a field is missing or not what it must be, does not fit the file's tensors, or
            asks for something mlx-lm's model does not do.
    """
    architecture, hidden_size = file.architecture, file.count("embedding_length")
    if file.get("expert_count"):
        raise file.error("is a mixture of experts, which is not read from GGUF.")
    n_heads = file.count("attention.head_count")
    head_dim = file.count("attention.key_length", max(hidden_size // n_heads, 1))
    if file.count("attention.value_length", head_dim) != head_dim:
        raise file.error("has K and V heads of different widths.")
    if "token_embd.weight" not in file.tensors:
        raise file.error("lacks the tensor token_embd.weight.")
    context = file.count("context_length")
    config = {
        "model_type": architecture,
        "hidden_size": hidden_size,
        "num_hidden_layers": file.count("block_count"),
        "intermediate_size": file.count("feed_forward_length"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": file.count("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": int(file.tensors["token_embd.weight"].shape[-1]),
        "max_position_embeddings": context,
        "rope_theta": file.number("rope.freq_base", 10000.0),
        "rope_traditional": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": any(f"blk.0.attn_{x}.bias" in file.tensors for x in ("q", "output")),
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    if architecture == "gemma3":
        config |= _gemma3(file, config)
    check_sizes(file, config)
    rope_dims = file.count("rope.dimension_count", head_dim)
    if rope_dims % 2 or rope_dims > head_dim:
        raise file.error(f"rotates {rope_dims} of {head_dim} dimensions of a head.")
    config["rope_scaling"] = _rope_scaling(file, rope_dims)
    if architecture == "phi3":
        config["partial_rotary_factor"] = rope_dims / head_dim
        config["original_max_position_embeddings"] = file.count(
            "rope.scaling.original_context_length", context
        )
    elif rope_dims != head_dim:
        raise file.error(
            f"rotates {rope_dims} of {head_dim} dimensions of a head, which mlx-lm's "
            f"{architecture} does not."
        )
    if head_dim != hidden_size // n_heads and architecture in ("qwen2", "phi3"):
        raise file.error(
            f"has heads of {head_dim} dimensions where mlx-lm's {architecture} has "
            f"{hidden_size // n_heads}."
        )
    return config


def _gemma3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm's gemma3_text has besides: windows, a second RoPE base, the queries' scale."""
    n_layers = config["num_hidden_layers"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if file.get(key):
            raise file.error(f"has {key}, which mlx-lm's gemma3_text does not do.")
    pattern = file.count("attention.sliding_window_pattern", _GEMMA3_PATTERN)
    if n_layers < pattern:
        raise file.error(
            f"has {n_layers} layers; one in {pattern} has no window, so there must be {pattern}."
        )
    head_dim = config["head_dim"]
    is_27b = n_layers == _GEMMA3_27B_LAYERS
    return {
        "model_type": "gemma3_text",
        "sliding_window": file.count("attention.sliding_window"),
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": file.number("rope.freq_base_swa", _GEMMA3_LOCAL_BASE),
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if is_27b else head_dim
        ),
    }


def check_sizes(file: GGUFFile, config: dict[str, Any]) -> None:
    """Compare what a file declares with the tensors that it has, before a model is built of it.

    Raises:
        InputError: they differ.
    """
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if n_heads % n_kv_heads:
        raise file.error(f"has {n_heads} query heads, which {n_kv_heads} KV heads do not divide.")
    _check_layers(file, config["num_hidden_layers"])
    query, rows = n_heads * config["head_dim"], n_kv_heads * config["head_dim"]
    columns = {
        "token_embd.weight": ("embedding_length", config["hidden_size"]),
        "blk.0.ffn_down.weight": ("feed_forward_length", config["intermediate_size"]),
        "blk.0.attn_output.weight": ("attention.head_count", query),
    }
    outputs = {
        "blk.0.attn_q.weight": ("attention.head_count", query),
        "blk.0.attn_k.weight": ("attention.head_count_kv", rows),
        "blk.0.attn_qkv.weight": ("attention.head_count_kv", query + 2 * rows),
    }
    for axis, wanted in ((0, columns), (-1, outputs)):
        for name, (key, size) in wanted.items():
            if name in file.tensors and int(file.tensors[name].shape[axis]) != size:
                shape = tuple(int(n) for n in reversed(file.tensors[name].shape))
                raise file.error(
                    f"has the tensor {name} of shape {shape}, which its "
                    f"{file.architecture}.{key} does not fit."
                )


def _check_layers(file: GGUFFile, n_layers: int) -> None:
    found = {int(match[1]) for name in file.tensors if (match := _LAYER.match(name))}
    if n_layers > len(found):
        raise file.error(f"declares {n_layers:,} layers and has tensors of {len(found):,}.")


def _rope_scaling(file: GGUFFile, rope_dims: int) -> dict[str, Any] | None:
    is_phi3 = file.architecture == "phi3"
    if is_phi3 and "rope_factors_long.weight" in file.tensors:
        factors = {
            f"{length}_factor": rope_factors(file, name, rope_dims).tolist()
            for length in ("long", "short")
            if (name := f"rope_factors_{length}.weight") in file.tensors
        }
        return {"type": "longrope", "short_factor": factors["long_factor"], **factors}
    kind, linear = file.get("rope.scaling.type"), file.get("rope.scale_linear")
    if not isinstance(kind, (str, type(None))):
        raise file.error(f"has {short(kind)} as {file.architecture}.rope.scaling.type.")
    factor_key = "rope.scaling.factor" if file.get("rope.scaling.factor") else "rope.scale_linear"
    if kind in (None, "none") and linear not in (None, 1.0):
        kind = "linear"
    if kind in (None, "none") or not file.get(factor_key):
        return None
    if is_phi3 or kind not in ("linear", "yarn"):
        raise file.error(
            f"scales RoPE by {short(kind)}; accepted are 'linear' and 'yarn' (and the factors of "
            "longrope for phi3)."
        )
    scaling = {"type": kind, "factor": file.number(factor_key)}
    if kind == "yarn":
        length = file.count("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = length
    return scaling


def rope_factors(file: GGUFFile, name: str, rope_dims: int) -> np.ndarray:
    """A tensor of RoPE factors, one for each pair of dimensions.

    Raises:
        InputError: it has another shape or type, or not only finite numbers above 0.
    """
    data = np.asarray(file.tensors[name].data)
    if data.shape != (rope_dims // 2,) or data.dtype not in (np.float32, np.float16):
        raise InputError(
            f"The tensor {name} of {file.path} has shape {data.shape}; accepted is one value for "
            f"each of {rope_dims // 2} pairs of dimensions."
        )
    factors = data.astype(np.float64)
    if not np.all(np.isfinite(factors) & (factors > 0)):
        raise file.error(f"has factors of RoPE in {name} that are not all above 0.")
    return factors
