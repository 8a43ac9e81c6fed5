"""What tells one model from another."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

ADAPTERS = ("lora_a", "lora_b", "m")  # LoRA's matrices, and DoRA's magnitudes


def fingerprint(model: nn.Module, adapters: bool = False) -> str:
    """A digest of a model's architecture and of the weights of its norms.

    Quantising a model leaves these weights as they are, so what belongs to the model stays valid.

    Args:
        adapters: whether the same model with other LoRA adapters counts as another one.
    """
    found = hashlib.sha256(type(model).__module__.encode())
    weights: Any = tree_flatten(model.parameters())
    taken = []
    for name, weight in weights:
        is_norm = weight.ndim == 1 and "norm" in name
        if is_norm or (adapters and name.rpartition(".")[2] in ADAPTERS):
            taken.append((name, weight.astype(mx.float32)))
    # at once: a GPU takes longer to be asked than to answer
    mx.eval([weight for _, weight in taken])
    for name, weight in taken:
        found.update(name.encode())
        found.update(np.array(weight).tobytes())
    return found.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """sha256 over the names, shapes, types and first values of a model's weights.

    Weights are sampled (the first 64 values of each), so that large models take no longer.
    """
    digest = hashlib.sha256()
    weights: Any = tree_flatten(model.parameters())
    weights = sorted(weights)
    firsts = [mx.contiguous(value.reshape(-1)[:64]) for _, value in weights]
    firsts = [x if x.dtype == mx.bool_ else x.view(mx.uint8) for x in firsts]
    mx.eval(firsts)  # at once, as above
    for (name, value), first in zip(weights, firsts):
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
        digest.update(bytes(first))
    return digest.hexdigest()
