"""Tiny models whose greedy text varies and hangs on the context.

With weights as they are first drawn, tiny models repeat their last token whatever came before:
equal tokens would prove nothing.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from tiny_models import tiny_model

SHARPER = {"q_proj": 12.0, "q_norm": 4.0, "qkv_proj": 3.0, "o_proj": 8.0, "out_proj": 4.0}


def varied_model(name: str, seed: int = 0, **changes: int) -> nn.Module:
    """A tiny model with untied embeddings and attention that looks at few tokens and counts."""
    model = tiny_model(name, seed, tie_word_embeddings=False, **changes)

    def scaled(path: str, weight: mx.array) -> mx.array:
        factor = next((f for part, f in SHARPER.items() if f"{part}.weight" in path), 1.0)
        return weight * factor

    model.update(tree_map_with_path(scaled, model.parameters()))
    mx.eval(model.parameters())
    return model
