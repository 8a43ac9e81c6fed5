"""GGUF files as mlx-lm models: metadata, configuration and the names of the tensors.

Read through ggml-org's own ``gguf`` package. Architectures: llama, qwen2, qwen3 and phi3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from .checks import check_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3")

_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass
class GGUFFile:
    """An opened GGUF file.

    metadata: every field by its key, as Python values.
    tensors: ``gguf.ReaderTensor`` by name; their data stays on disk until it is used.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def architecture(self) -> str:
        return self.metadata.get("general.architecture", "")

    def get(self, key: str, default: Any = None) -> Any:
        """The field ``<architecture>.<key>``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """The field ``<architecture>.<key>``.

        Raises:
            InputError: the file doesn't have it.
        """
        value = self.get(key)
        if value is None:
            raise InputError(
                f"The GGUF file {self.path} lacks the field {self.architecture}.{key}."
            )
        return value


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file and read its metadata, but no tensor.

    Raises:
        InputError: missing, unreadable, damaged, or of an architecture not in ARCHITECTURES.
    """
    from gguf import GGUFReader

    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no GGUF file at {path}.")
    check_gguf(path)
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"The GGUF file {path} is damaged: {error}.") from error
    file = GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    if len(file.tensors) != metadata["GGUF.tensor_count"]:
        raise InputError(
            f"The GGUF file {path} announces {metadata['GGUF.tensor_count']} tensors and holds "
            f"{len(file.tensors)} different ones."
        )
    if file.architecture not in ARCHITECTURES:
        raise InputError(
            f"The GGUF file {path} has the architecture {file.architecture!r}; accepted are "
            f"{', '.join(ARCHITECTURES)}."
        )
    return file


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """The file's hyperparameters under the names of mlx-lm's (and Hugging Face's) config.json.

    Raises:
        InputError: a field is missing, or asks for something mlx-lm's model does not do.
    """
    architecture = file.architecture
    if file.get("expert_count"):
        raise InputError(
            f"The GGUF file {file.path} is a mixture of experts, which is not read from GGUF."
        )
    hidden_size = file.need("embedding_length")
    n_heads = _one_value(file, "attention.head_count")
    head_dim = file.get("attention.key_length") or hidden_size // n_heads
    if file.get("attention.value_length", head_dim) != head_dim:
        raise InputError(f"The GGUF file {file.path} has K and V heads of different widths.")
    config = {
        "model_type": architecture,
        "hidden_size": hidden_size,
        "num_hidden_layers": file.need("block_count"),
        "intermediate_size": _one_value(file, "feed_forward_length"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": _one_value(file, "attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.need("attention.layer_norm_rms_epsilon"),
        "vocab_size": _vocab_size(file),
        "max_position_embeddings": file.need("context_length"),
        "rope_theta": file.get("rope.freq_base", 10000.0),
        "rope_traditional": False,
        "rope_scaling": _rope_scaling(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": any(f"blk.0.attn_{x}.bias" in file.tensors for x in ("q", "output")),
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    rope_dims = file.get("rope.dimension_count", head_dim)
    if architecture == "phi3":
        config["partial_rotary_factor"] = rope_dims / head_dim
        config["original_max_position_embeddings"] = file.get(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
    elif rope_dims != head_dim:
        raise InputError(
            f"The GGUF file {file.path} rotates {rope_dims} of {head_dim} dimensions of a head, "
            f"which mlx-lm's {architecture} does not."
        )
    if head_dim != hidden_size // n_heads and architecture in ("qwen2", "phi3"):
        raise InputError(
            f"The GGUF file {file.path} has heads of {head_dim} dimensions where mlx-lm's "
            f"{architecture} has {hidden_size // n_heads}."
        )
    return config


def parameter_name(name: str, architecture: str) -> str | None:
    """mlx-lm's name of a GGUF tensor, or None where the architecture has no such tensor."""
    match = _LAYER_NAME.fullmatch(name)
    if match:
        layer, part, suffix = match.groups()
        part = _IN_LAYER.get(part)
        if architecture == "phi3" and part == "mlp.up_proj":
            part = "mlp.gate_up_proj"
        return part and f"model.layers.{layer}.{part}.{suffix}"
    part, _, suffix = name.rpartition(".")
    if suffix == "weight" and part in _TOP_LEVEL:
        return f"{_TOP_LEVEL[part]}.{suffix}"
    return None


def _vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"The GGUF file {file.path} lacks the tensor token_embd.weight.")
    return int(embedding.shape[-1])


def _one_value(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A field that may be a list with one value a layer, which must then agree."""
    value = file.get(key, default)
    if value is None:
        value = file.need(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise InputError(
                f"The GGUF file {file.path} varies {key} from layer to layer, which mlx-lm's "
                f"{file.architecture} does not."
            )
        value = value[0]
    return value


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    if file.architecture == "phi3" and "rope_factors_long.weight" in file.tensors:
        factors = {
            f"{length}_factor": file.tensors[f"rope_factors_{length}.weight"].data.tolist()
            for length in ("long", "short")
            if f"rope_factors_{length}.weight" in file.tensors
        }
        factors.setdefault("short_factor", factors["long_factor"])
        return {"type": "longrope", **factors}
    kind = file.get("rope.scaling.type")
    factor = file.get("rope.scaling.factor") or file.get("rope.scale_linear")
    if kind in (None, "none") and file.get("rope.scale_linear", 1.0) != 1.0:
        kind = "linear"
    if kind in (None, "none") or not factor:
        return None
    if kind == "linear" and file.architecture != "phi3":
        return {"type": "linear", "factor": float(factor)}
    if kind == "yarn" and file.architecture != "phi3":
        return {
            "type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": file.need("rope.scaling.original_context_length"),
        }
    raise InputError(
        f"The GGUF file {file.path} scales RoPE by {kind!r}; accepted are 'linear' and 'yarn' "
        "(and the factors of longrope for phi3)."
    )
