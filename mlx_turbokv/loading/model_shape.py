"""The KV layers of a model without its weights, and the bytes of what is not packed."""

from __future__ import annotations

import math
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
from .memory import activation_bytes, gpu_scratch
from .weight_bits import weight_bytes


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
        weight_bytes: of the weights, quantised as the configuration says.
        activation_bytes: of a token while a prompt is read, in a 16-bit type.
    """

    name: str
    layers: KVLayers
    n_caches: int
    n_parameters: int | None = None
    max_context: int | None = None
    n_heads: int | None = None
    key_bias: bool | None = None
    uncompressed: tuple[Uncompressed, ...] = ()
    weight_bytes: int | None = None
    activation_bytes: int | None = None

    @property
    def shapes(self) -> list[KVShape]:
        """Heads and head_dims of the KV layers, in order."""
        return [layer.shape for layer in self.layers.layers if layer.shape is not None]

    def scratch(self, n_tokens: int, step: int) -> int:
        """Bytes above weights and caches while a GPU reads a prompt, ``step`` tokens at a time.

        0 where only KV shapes are known.
        """
        if self.activation_bytes is None:
            return 0
        return gpu_scratch(n_tokens, step, self.activation_bytes)


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
    sizes = {name: array.shape for name, array in parameters(model).items()}
    model.set_dtype(mx.bfloat16)
    return ModelShape(
        name=name,
        layers=layers,
        n_caches=len(own_caches(model)),
        n_parameters=sum(math.prod(shape) for shape in sizes.values()),
        max_context=max_context(config),
        n_heads=text.get("num_attention_heads"),
        key_bias=has_key_bias(model),
        uncompressed=_uncompressed(model, layers),
        weight_bytes=weight_bytes(sizes, config),
        activation_bytes=activation_bytes(model),
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
