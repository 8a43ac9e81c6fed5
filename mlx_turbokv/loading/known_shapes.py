"""The KV layers of a model that is not there: from its configuration, or by a known name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, RotatingKVCache

from ..cache.summary import leaves
from ..centring.bias import has_key_bias
from ..errors import InputError
from ..model.caches import own_caches
from ..model.kv_layers import KVLayer, KVLayers, kv_layers
from ..model.shapes import KVShape

_PHI_4 = {
    "model_type": "phi3",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "intermediate_size": 17920,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000,
}
_QWEN2_5_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_LLAMA_3_1_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN3_5_27B = {
    "model_type": "qwen3_5",
    "text_config": {
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "intermediate_size": 17408,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "full_attention_interval": 4,
        "linear_num_value_heads": 48,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
}
# Models of the paper and of the benchmarks, so that `plan` answers for them without a network.
KNOWN: dict[str, dict[str, Any]] = {
    "phi-4": _PHI_4,
    "Qwen2.5-7B": _QWEN2_5_7B,
    "Llama-3.1-8B": _LLAMA_3_1_8B,
    "Qwen3.5-27B": _QWEN3_5_27B,
}


@dataclass(frozen=True)
class Beside:
    """A cache that is left alone: a window of K and V, or a state that does not grow.

    Args:
        kind: ``"window"`` or ``"recurrent"``.
        window: tokens of the window; 0 for a state.
        n_bytes: of one token of a window, or of the whole state, in a bfloat16 model.
    """

    kind: str
    window: int
    n_bytes: int

    def bytes_at(self, n_tokens: int) -> int:
        """Bytes after ``n_tokens`` tokens."""
        return self.n_bytes * (min(n_tokens, self.window) if self.window else 1)


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model.

    Args:
        name: what to call it.
        layers: the KV layers and what is left alone; every KV layer has its shape.
        n_caches: entries of the cache list, which is what counting by raw layer index counts.
        n_parameters: weights of the whole model, or None where only KV shapes are known.
        max_context: positions that the model was made for, or None.
        n_heads: query heads, or None.
        key_bias: whether the key projection has a bias, or None where it cannot be told.
        beside: sliding windows, chunks and recurrent states that are left alone.
    """

    name: str
    layers: KVLayers
    n_caches: int
    n_parameters: int | None = None
    max_context: int | None = None
    n_heads: int | None = None
    key_bias: bool | None = None
    beside: tuple[Beside, ...] = ()

    @property
    def shapes(self) -> list[KVShape]:
        """Heads and head_dims of the KV layers, in order."""
        return [layer.shape for layer in self.layers.layers if layer.shape is not None]


def known_config(name: str) -> dict[str, Any] | None:
    """The configuration of a model that is known by name, or None."""
    wanted = name.casefold()
    return next((config for key, config in KNOWN.items() if key.casefold() == wanted), None)


def shape_from_config(
    config: dict[str, Any], name: str, compress_sliding: bool = False
) -> ModelShape:
    """A model's KV layers, from its config.json alone; ``compress_sliding`` as in ``kv_layers``.

    The model of mlx-lm is built with lazy weights, which are never made, and called with one
    token, which is never computed.

    Raises:
        InputError: mlx-lm has no such model, or its KV layers cannot be learnt this way.
    """
    from mlx_lm.utils import _get_classes

    text = config.get("text_config") or config
    try:
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"mlx-lm cannot build {name} (model type {config.get('model_type')!r}): {first}"
        ) from error
    layers = kv_layers(model, None, compress_sliding)
    if any(layer.shape is None for layer in layers.layers):
        layers = _with_config_shapes(layers, text, name)
    return ModelShape(
        name=name,
        layers=layers,
        n_caches=len(own_caches(model)),
        n_parameters=sum(array.size for _, array in tree_flatten(model.parameters())),
        max_context=text.get("max_position_embeddings"),
        n_heads=text.get("num_attention_heads"),
        key_bias=has_key_bias(model),
        beside=_beside(model, layers),
    )


def hypothetical_shape(
    n_layers: int, n_kv_heads: int, head_dim: int, v_head_dim: int | None = None
) -> ModelShape:
    """A model of pure attention with ``n_layers`` equal layers.

    Raises:
        InputError: a count below 1.
    """
    shape = KVShape(n_kv_heads, head_dim, v_head_dim or head_dim)
    if min(n_layers, n_kv_heads, head_dim, shape.v_head_dim) < 1:
        raise InputError("Numbers of layers, heads and dimensions must be 1 or more.")
    layers = [KVLayer(i, i, None, shape) for i in range(n_layers)]
    name = f"{n_layers} KV layers of {n_kv_heads} heads"
    return ModelShape(name, KVLayers(layers, [], n_layers), n_layers)


def _beside(model: nn.Module, layers: KVLayers) -> tuple[Beside, ...]:
    """What the caches left alone take, read off a call with one token that is never computed.

    Empty for a model that cannot be called this way.
    """
    caches = own_caches(model)
    packed = {(layer.index, layer.sub) for layer in layers.layers}
    try:
        model.set_dtype(mx.bfloat16)
        model(mx.zeros((1, 1), mx.int32), cache=caches)
    except Exception:  # what a model needs beyond tokens is known to its own loader alone
        return ()
    found = []
    for index, cache in enumerate(caches):
        for sub, entry in enumerate(leaves([cache])):
            if (index, None) in packed or (index, sub) in packed:
                continue
            if isinstance(entry, ArraysCache):
                found.append(Beside("recurrent", 0, entry.nbytes))
            elif isinstance(entry, (RotatingKVCache, ChunkedKVCache)) and entry.keys is not None:
                window = getattr(entry, "max_size", None) or entry.chunk_size
                found.append(Beside("window", window, entry.nbytes // entry.keys.shape[2]))
    return tuple(found)


def _with_config_shapes(layers: KVLayers, text: dict[str, Any], name: str) -> KVLayers:
    """Shapes from the usual fields, for a model that cannot be called with a token."""
    n_heads = text.get("num_attention_heads")
    head_dim = text.get("head_dim") or (n_heads and text.get("hidden_size", 0) // n_heads)
    if not head_dim:
        raise InputError(
            f"{name} does not say its KV heads: give --kv-layers, --kv-heads and --head-dim."
        )
    shape = KVShape(
        text.get("num_key_value_heads") or n_heads, head_dim, text.get("v_head_dim") or head_dim
    )
    return replace(layers, layers=[replace(x, shape=x.shape or shape) for x in layers.layers])
