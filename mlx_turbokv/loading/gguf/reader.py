"""Metadata of GGUF files, read with the ``gguf`` package, and the configuration made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from .checks import checked_reader

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3")
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
            raise self.error(f"lacks the field {self.architecture}.{key}.")
        return value

    def error(self, what: str) -> InputError:
        """The error "The GGUF file PATH ``what``"."""
        return InputError(f"The GGUF file {self.path} {what}")


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file and read its metadata, but no tensor.

    Raises:
        InputError: missing, unreadable, damaged, or of an architecture not in ARCHITECTURES.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no GGUF file at {path}.")
    reader = checked_reader(path)
    try:
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"The GGUF file {path} is damaged: {error}.") from error
    file = GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    n_tensors = metadata["GGUF.tensor_count"]
    if len(file.tensors) != n_tensors:
        raise file.error(
            f"announces {n_tensors} tensors and holds {len(file.tensors)} different ones."
        )
    if file.architecture not in ARCHITECTURES:
        raise file.error(
            f"has the architecture {file.architecture!r}; accepted are {', '.join(ARCHITECTURES)}."
        )
    return file


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """The file's hyperparameters under the names of mlx-lm's (and Hugging Face's) config.json.

    Raises:
        InputError: a field is missing, or asks for something mlx-lm's model does not do.
    """
    architecture, hidden_size = file.architecture, file.need("embedding_length")
    if file.get("expert_count"):
        raise file.error("is a mixture of experts, which is not read from GGUF.")
    n_heads = _one_value(file, "attention.head_count")
    head_dim = file.get("attention.key_length") or hidden_size // n_heads
    if file.get("attention.value_length", head_dim) != head_dim:
        raise file.error("has K and V heads of different widths.")
    if "token_embd.weight" not in file.tensors:
        raise file.error("lacks the tensor token_embd.weight.")
    config = {
        "model_type": architecture,
        "hidden_size": hidden_size,
        "num_hidden_layers": file.need("block_count"),
        "intermediate_size": _one_value(file, "feed_forward_length"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": _one_value(file, "attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.need("attention.layer_norm_rms_epsilon"),
        "vocab_size": int(file.tensors["token_embd.weight"].shape[-1]),
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


def _one_value(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A field that may be a list with one value a layer, all equal."""
    value = file.need(key) if default is None else file.get(key, default)
    values = value if isinstance(value, list) else [value]
    if len(set(values)) != 1:
        raise file.error(
            f"varies {key} from layer to layer, which mlx-lm's {file.architecture} does not."
        )
    return values[0]


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    is_phi3 = file.architecture == "phi3"
    if is_phi3 and "rope_factors_long.weight" in file.tensors:
        factors = {
            f"{length}_factor": file.tensors[f"rope_factors_{length}.weight"].data.tolist()
            for length in ("long", "short")
            if f"rope_factors_{length}.weight" in file.tensors
        }
        return {"type": "longrope", "short_factor": factors["long_factor"], **factors}
    kind, linear = file.get("rope.scaling.type"), file.get("rope.scale_linear")
    factor = file.get("rope.scaling.factor") or linear
    if kind in (None, "none") and linear not in (None, 1.0):
        kind = "linear"
    if kind in (None, "none") or not factor:
        return None
    if is_phi3 or kind not in ("linear", "yarn"):
        raise file.error(
            f"scales RoPE by {kind!r}; accepted are 'linear' and 'yarn' (and the factors of "
            "longrope for phi3)."
        )
    scaling = {"type": kind, "factor": float(factor)}
    if kind == "yarn":
        length = file.need("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = length
    return scaling
