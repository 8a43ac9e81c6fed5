"""Metadata of GGUF files, read with the ``gguf`` package, and the configuration made from it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, short
from .checks import checked_reader

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3")
MOST = (1 << 31) - 1
MOST_SPLIT_LAYERS = 1024  # of a file that is one of several, which does not have all layers
_LARGEST = 1e30  # numbers beyond it are no float32 in a product
_LAYER = re.compile(r"blk\.(\d{1,6})\.", re.ASCII)
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
        found = self.metadata.get("general.architecture", "")
        return found if isinstance(found, str) else ""

    @property
    def name(self) -> str:
        """What the file calls its model, or its own name."""
        found = self.metadata.get("general.name")
        return found if isinstance(found, str) and found else self.path.stem

    def get(self, key: str, default: Any = None) -> Any:
        """The field ``<architecture>.<key>``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """The whole number ``<architecture>.<key>``, 1 or more.

        A list with one value a layer, all equal, counts as one.

        Raises:
            InputError: the file doesn't have it and there is no default, or it is something else.
        """
        value = self._one("a whole number", key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(
                f"has {short(value)} as {self.architecture}.{key}; accepted are whole numbers "
                f"from 1 to {most:,}."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The finite number ``<architecture>.<key>``, more than 0.

        Raises:
            InputError: the file doesn't have it and there is no default, or it is something else.
        """
        value = self._one("a number", key, default)
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or not 0 < value < _LARGEST:
            raise self.error(
                f"has {short(value)} as {self.architecture}.{key}; accepted are numbers above 0."
            )
        return float(value)

    def _one(self, what: str, key: str, default: float | None) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.error(f"lacks the field {self.architecture}.{key}, {what}.")
        if isinstance(value, list) and value:
            if any(other != value[0] for other in value):
                raise self.error(
                    f"varies {key} from layer to layer, which mlx-lm's {self.architecture} does "
                    "not."
                )
            value = value[0]
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
            f"has the architecture {short(file.architecture)}; accepted are "
            f"{', '.join(ARCHITECTURES)}."
        )
    return file


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
    split = file.metadata.get("split.count", 1)
    most = MOST_SPLIT_LAYERS if type(split) is int and split > 1 else len(found)
    if n_layers > most:
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
