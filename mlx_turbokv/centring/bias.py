"""Key means from the bias of a model's key projection: always available, nothing to calibrate.

The bias is what an attention layer's keys are where its input is zero, at position 0. That holds
for separate and fused projections, quantised or not, whatever the order of their outputs. Where
keys are normalised after the projection this is no constant part of them; an input and its
negative show that, and such a layer has no reference here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..log import log_failure
from ..model.caches import model_layers, own_caches
from ..model.kv_layers import KVLayer
from ..model.probing import RecordingCache

# names of the modules that keys come out of, alone or beside queries and values
PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "wqkv", "wk")
# how far keys may be from affine in the input, relative to the largest: half precision
AFFINE_RTOL = 2e-2


def key_biases(model: nn.Module, layers: list[KVLayer]) -> dict[int, mx.array]:
    """The constant part of the keys of KV layers, by ordinal; layers without one are missing.

    Shapes:
        returns: [H, head_dim] float32 each.
    """
    width = _embedding_width(model)
    blocks = model_layers(model)
    if width is None or not layers or max(layer.index for layer in layers) >= len(blocks):
        return {}
    if len(blocks) != len(own_caches(model)):
        return {}  # which layer owns which cache is not known
    zeros = {}
    for layer in layers:
        for module in _attention_modules(blocks[layer.index]):
            keys = _keys_at(module, mx.zeros((1, 1, width)))
            if keys is not None:
                zeros[layer.ordinal] = module, keys
                break
    present = {i: mx.any(keys) for i, (_, keys) in zeros.items()}
    mx.eval(present)
    return {
        i: keys for i, (module, keys) in zeros.items()
        if present[i].item() and _is_constant_part(module, keys, width)
    }  # fmt: skip


def has_key_bias(model: nn.Module) -> bool:
    """Whether some key projection has a bias, by its name: nothing is computed."""
    for block in model_layers(model):
        for module in _attention_modules(block):
            for name, child in module.children().items():
                if name in PROJECTIONS and isinstance(child, nn.Module) and "bias" in child:
                    return True
    return False


def _is_constant_part(module: nn.Module, zero: mx.array, width: int) -> bool:
    """Whether keys are affine in the input, so that ``zero`` is a part of all of them."""
    x = mx.random.normal((1, 1, width), key=mx.random.key(0))
    up, down = _keys_at(module, x), _keys_at(module, -x)
    if up is None or down is None:
        return False
    largest = mx.maximum(mx.abs(up), mx.abs(down)).max()
    return bool((mx.abs(up + down - 2 * zero).max() < AFFINE_RTOL * largest).item())


def _keys_at(module: nn.Module, x: mx.array) -> mx.array | None:
    """The keys that an attention module makes of ``x`` at position 0; [H, head_dim] float32."""
    cache = RecordingCache()
    try:
        module(x, mask=None, cache=cache)
    except Exception as error:  # no attention after all, or one that needs more than these
        log_failure(f"The key bias of {type(module).__name__} cannot be read off", error)
        return None
    if cache.keys is None or cache.keys.shape[2] != 1:
        return None
    return cache.keys[0, :, 0].astype(mx.float32)


def _attention_modules(block: Any) -> Iterator[nn.Module]:
    if not isinstance(block, nn.Module):  # another rank's, or a model that only counts its layers
        return
    for name, module in block.named_modules():
        leaf = name.rsplit(".", 1)[-1].lower()
        if not name or not module.children():  # a norm, say
            continue
        if "attn" in leaf or "attention" in leaf or "Attention" in type(module).__name__:
            yield module


def _embedding_width(model: nn.Module) -> int | None:
    """The width of the model's hidden states: that of its first embedding."""
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedEmbedding):
            return module.dims
        if isinstance(module, nn.Embedding):
            return module.weight.shape[-1]
    return None
