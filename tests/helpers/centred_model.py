"""A tiny Qwen2 whose key biases are as large and as slow as those of real ones.

In Qwen2.5-1.5B's worst layer the bias has a norm of 1,237 against about 20 for what varies, and
the slowest eighth of the pairs hold nearly all of it.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tiny_models import tiny_model

BIAS_OVER_REST = 60.0
SLOWEST_SHARE = 0.97  # of the bias's energy, in the slowest eighth; the next eighth has the rest
HEAD_DIM = 32
# queries and keys, and what attention adds: so that what a model says hangs on attention
ATTENTION_GAIN, VALUE_GAIN, LOGIT_GAIN = 1.5, 4.0, 8.0


def centred_model(seed: int = 0) -> nn.Module:
    """The model; its keys vary with a norm of about 1 / BIAS_OVER_REST of their bias's."""
    model = tiny_model("qwen2", seed, rope_theta=1e6, tie_word_embeddings=False)
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight = projection.weight * ATTENTION_GAIN
        attention.v_proj.weight = attention.v_proj.weight * VALUE_GAIN
        x = mx.random.normal((64, model.args.hidden_size), key=mx.random.key(seed))
        rest = mx.linalg.norm((x @ attention.k_proj.weight.T).reshape(64, -1, HEAD_DIM), axis=-1)
        norm = BIAS_OVER_REST * rest.mean().item()
        attention.k_proj.bias = mx.array(slow_bias(rng, attention.n_kv_heads, norm).reshape(-1))
    model.lm_head.weight = model.lm_head.weight * LOGIT_GAIN
    mx.eval(model.parameters())
    return model


def slow_bias(rng: np.random.Generator, n_heads: int, norm: float) -> np.ndarray:
    """[n_heads, HEAD_DIM] float32, pairs (i, HEAD_DIM / 2 + i), the last the slowest."""
    n_pairs = HEAD_DIM // 2
    pairs = np.zeros((n_heads, 2, n_pairs))
    for first, share in ((n_pairs * 7 // 8, SLOWEST_SHARE), (n_pairs * 6 // 8, 1 - SLOWEST_SHARE)):
        part = rng.standard_normal((n_heads, 2, n_pairs // 8))
        part *= np.sqrt(share) / np.linalg.norm(part, axis=(1, 2), keepdims=True)
        pairs[:, :, first : first + n_pairs // 8] = part
    return (norm * pairs.reshape(n_heads, HEAD_DIM)).astype(np.float32)
