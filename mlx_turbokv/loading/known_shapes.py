"""The KV layers of a model without its weights: from a configuration, or by a known name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, RotatingKVCache

from ..cache.summary import leaves
from ..centring.bias import has_key_bias
from ..errors import InputError
from ..log import log_failure
from ..model.caches import own_caches
from ..model.kv_layers import KVLayer, KVLayers, kv_layers
from ..model.shapes import KVShape
from .config import build_model, max_context, parameters, text_config

_FIELDS = (
    "model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip


def _config(*values: Any, **others: Any) -> dict[str, Any]:
    return dict(zip(_FIELDS, values)) | others


# Models of the paper and of the benchmarks, so that `plan` works for them without a network.
KNOWN: dict[str, dict[str, Any]] = {
    "phi-4": _config(
        "phi3", 5120, 40, 17920, 40, 10, 100352, 16384,
        original_max_position_embeddings=16384, rms_norm_eps=1e-5, rope_theta=250000,
    ),
    "Qwen2.5-7B": _config(
        "qwen2", 3584, 28, 18944, 28, 4, 152064, 32768,
        rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": _config(
        "llama", 4096, 32, 14336, 32, 8, 128256, 131072,
        rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
    "Qwen3.5-27B": {
        "model_type": "qwen3_5",
        "text_config": _config(
            "qwen3_5_text", 5120, 64, 17408, 24, 4, 248320, 262144,
            head_dim=256, full_attention_interval=4, linear_num_value_heads=48,
            linear_num_key_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
        ),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Uncompressed:
    """A cache that is not packed: a window of K and V, or a state that does not grow.

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
    """The KV layers of a model and the sizes that planning needs.

    Args:
        name: of the model, for tables.
        layers: the KV layers, each with its shape.
        n_caches: entries of the cache list, which is what counting by raw layer index counts.
        n_parameters: weights of the whole model, or None where only KV shapes are known.
        max_context: positions that the model was made for, or None.
        n_heads: query heads, or None.
        key_bias: whether the key projection has a bias, or None where it cannot be told.
        uncompressed: sliding windows, chunks and recurrent states.
    """

    name: str
    layers: KVLayers
    n_caches: int
    n_parameters: int | None = None
    max_context: int | None = None
    n_heads: int | None = None
    key_bias: bool | None = None
    uncompressed: tuple[Uncompressed, ...] = ()

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

    The model of mlx-lm is built with lazy weights and called with one token, both never computed.

    Raises:
        InputError: mlx-lm has no such model, or the shapes of its KV layers cannot be found.
    """
    text, model = text_config(config), build_model(config, name)
    layers = kv_layers(model, None, compress_sliding)
    if any(layer.shape is None for layer in layers.layers):
        layers = _with_config_shapes(layers, text, name)
    return ModelShape(
        name=name,
        layers=layers,
        n_caches=len(own_caches(model)),
        n_parameters=sum(array.size for array in parameters(model).values()),
        max_context=max_context(config),
        n_heads=text.get("num_attention_heads"),
        key_bias=has_key_bias(model),
        uncompressed=_uncompressed(model, layers),
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


def _uncompressed(model: Any, layers: KVLayers) -> tuple[Uncompressed, ...]:
    """Sizes of the caches that are not packed, from a lazy call with one token.

    Empty for a model that cannot be called with tokens alone.
    """
    caches = own_caches(model)
    packed = {(layer.index, layer.sub) for layer in layers.layers}
    try:
        model.set_dtype(mx.bfloat16)
        model(mx.zeros((1, 1), mx.int32), cache=caches)
    except Exception as error:  # the model needs more than tokens
        log_failure(f"{type(model).__name__} cannot be called with tokens alone", error)
        return ()
    found = []
    for index, cache in enumerate(caches):
        for sub, entry in enumerate(leaves([cache])):
            if (index, None) in packed or (index, sub) in packed:
                continue
            if isinstance(entry, ArraysCache):
                found.append(Uncompressed("recurrent", 0, entry.nbytes))
            elif isinstance(entry, (RotatingKVCache, ChunkedKVCache)) and entry.keys is not None:
                window = getattr(entry, "max_size", 0) or getattr(entry, "chunk_size", 0)
                found.append(Uncompressed("window", window, entry.nbytes // entry.keys.shape[2]))
    return tuple(found)


def _with_config_shapes(layers: KVLayers, text: dict[str, Any], name: str) -> KVLayers:
    """Shapes from the usual fields, for a model that cannot be called with a token."""
    n_heads = text.get("num_attention_heads") or 0
    head_dim = text.get("head_dim") or (n_heads and text.get("hidden_size", 0) // n_heads)
    if not head_dim:
        raise InputError(
            f"{name} does not say its KV heads: give --kv-layers, --kv-heads and --head-dim."
        )
    shape = KVShape(
        text.get("num_key_value_heads") or n_heads, head_dim, text.get("v_head_dim") or head_dim
    )
    return replace(layers, layers=[replace(x, shape=x.shape or shape) for x in layers.layers])
