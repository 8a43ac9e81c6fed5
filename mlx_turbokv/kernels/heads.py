"""Attention over dequantised rows, a few KV heads at a time, so that they stay small in memory."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .checks import check_sinks

# bytes of dequantised K and V that one attention call may hold
TRANSIENT_BYTES = 128 * 2**20
scaled_dot_product_attention = mx.fast.scaled_dot_product_attention


def heads_at_once(n_heads: int, bytes_each: int, limit: int) -> int:
    """How many KV heads to dequantise at a time: what ``limit`` bytes hold, evenly cut."""
    most = max(1, limit // bytes_each)
    return -(-n_heads // -(-n_heads // most))


def attention_by_heads(
    queries: mx.array,
    rows: Callable[[int, int], tuple[mx.array, mx.array]],
    n_kv_heads: int,
    bytes_each: int,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """MLX's attention over rows that are made for some KV heads at a time.

    Args:
        rows: K and V of KV heads ``first`` to ``first + count``, from (first, count).
        bytes_each: of the rows of one KV head.
        mask, sinks: in the queries' dtype, as ``mx.fast.scaled_dot_product_attention`` takes them.

    Shapes:
        queries: [B, n_heads, L, k_head_dim]; returns: [B, n_heads, L, v_head_dim].
    """
    if sinks is not None:
        check_sinks("attention", sinks, queries.shape[1])
    gqa_factor = queries.shape[1] // n_kv_heads
    step = heads_at_once(n_kv_heads, bytes_each, TRANSIENT_BYTES)
    outputs = []
    for first in range(0, n_kv_heads, step):
        count = min(step, n_kv_heads - first)
        heads = slice(first * gqa_factor, (first + count) * gqa_factor)
        own_mask = mask
        if isinstance(mask, mx.array) and mask.ndim > 2 and mask.shape[-3] > 1:
            own_mask = mask[..., heads, :, :]
        own_sinks = None if sinks is None else sinks[heads]
        keys, values = rows(first, count)
        output = scaled_dot_product_attention(
            queries[:, heads], keys, values, scale=scale, mask=own_mask, sinks=own_sinks
        )
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
