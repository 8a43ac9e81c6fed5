"""A tiny Llama whose keys have a large mean in slow pairs, as trained models without biases do.

Only the key of the token SINK, with which sequences begin, is without it.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from centred_model import ATTENTION_GAIN, HEAD_DIM, LOGIT_GAIN, VALUE_GAIN, slow_bias
from tiny_models import tiny_model

from mlx_turbokv.centring import first_use
from mlx_turbokv.centring.calibration import calibrate_keys

VOCABULARY = 96  # of characters.py
SINK = 95
MEAN_OVER_REST = 12.0
SHIFT = 1.0  # of embeddings, over their own norm


def planted_model(seed: int = 0) -> nn.Module:
    """The model: hidden states share a direction, and the key projection answers to it."""
    model = tiny_model(
        "llama", seed, rope_theta=1e6, tie_word_embeddings=False, vocab_size=VOCABULARY,
        head_dim=HEAD_DIM,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    width = model.args.hidden_size
    shared = rng.standard_normal(width)
    shared /= np.linalg.norm(shared)
    embedding = model.model.embed_tokens.weight
    size = mx.linalg.norm(embedding, axis=-1).mean().item()
    is_sink = mx.arange(VOCABULARY)[:, None] == SINK
    shifted = embedding + mx.array(SHIFT * size * shared, mx.float32)
    model.model.embed_tokens.weight = mx.where(is_sink, embedding, shifted)
    for layer in model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight = projection.weight * ATTENTION_GAIN
        attention.v_proj.weight = attention.v_proj.weight * VALUE_GAIN
        rest = mx.linalg.norm(attention.k_proj.weight) / np.sqrt(attention.n_kv_heads)
        mean = slow_bias(rng, attention.n_kv_heads, MEAN_OVER_REST * rest.item()).reshape(-1, 1)
        planted = mean * shared[None] / np.sqrt(width)
        attention.k_proj.weight = attention.k_proj.weight + mx.array(planted, mx.float32)
    model.lm_head.weight = model.lm_head.weight * LOGIT_GAIN
    mx.eval(model.parameters())
    return model


def counted_runs(monkeypatch) -> list[np.ndarray]:
    """The windows that models are measured with from now on, a run each."""
    found: list[np.ndarray] = []

    def counted(model, windows, *args, **kwargs):
        found.append(np.asarray(windows))
        return calibrate_keys(model, windows, *args, **kwargs)

    monkeypatch.setattr(first_use, "calibrate_keys", counted)
    return found
