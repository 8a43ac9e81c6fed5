"""Replaces ``mx.fast.scaled_dot_product_attention``, through which nearly all mlx-lm models go.

Given the K and V of a packed cache it reads the packed rows; anything else goes to MLX.
"""

from __future__ import annotations

import sys
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from ..kernels.packed import PaddedCausal
from ..kernels.tables import int_array
from .arrays import Handle, Hidden, KVArray, Source, TurboArray, as_array
from .dispatch import attention

_mlx_attention = mx.fast.scaled_dot_product_attention


def scaled_dot_product_attention(
    q: mx.array,
    k: KVArray,
    v: KVArray,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    **options,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention``, which also takes K and V of packed caches."""
    if isinstance(k, (Handle, TurboArray)) and isinstance(v, (Handle, TurboArray)):
        source = k.source
        if source is v.source and k.is_keys and not v.is_keys and not options:
            if source.hidden.count:
                return _attention_past_hidden_rows(q, source, scale, mask, sinks)
            packed, backend, _, held = source
            return attention(q, packed, scale, mask, sinks, backend=backend, held=held)
    k, v = as_array(k), as_array(v)
    return _mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)


def _attention_past_hidden_rows(
    q: mx.array, source: Source, scale: float, mask: mx.array | str | None, sinks: mx.array | None
) -> mx.array:
    packed, backend, hidden, held = source
    attend = partial(attention, backend=backend, held=held)
    if mask is None and hidden.first == 0:
        left_padding = int_array(*[hidden.count] * q.shape[0])
        return attend(q, packed, scale, None, sinks, left_padding)
    if type(mask) is PaddedCausal and q.shape[2] == 1:
        left_padding = mask.left_padding + hidden.count
        return attend(q, packed, scale, None, sinks, left_padding)
    mask = with_hidden_columns(mask, hidden, q.shape[2], packed.n_tokens)
    return attend(q, packed, scale, mask, sinks)


def with_hidden_columns(
    mask: mx.array | str | None, hidden: Hidden, n_queries: int, n_rows: int
) -> mx.array:
    """A mask over all packed rows from one over those that are seen.

    Shapes:
        mask: [..., n_rows - hidden.count], "causal" (lower right) or None.
        returns: [..., n_rows].
    """
    if isinstance(mask, mx.array):
        fill = False if mask.dtype == mx.bool_ else -mx.inf
        columns = mx.full((*mask.shape[:-1], hidden.count), fill, mask.dtype)
        parts = [mask[..., : hidden.first], columns, mask[..., hidden.first :]]
        return mx.concatenate(parts if hidden.first else parts[1:], axis=-1)
    rows = mx.arange(n_rows)[None]
    seen = (rows < hidden.first) | (rows >= hidden.first + hidden.count)
    if mask is None:
        return seen
    return seen & (rows <= mx.arange(n_rows - n_queries, n_rows)[:, None])


class AttentionFunctions:
    """The attention functions that a model calls, as they are now.

    ``Handle``s are only understood by the functions of this module. Whoever replaces attention
    later, in MLX, in mlx-lm or in the model's own module, is given arrays.

    Args:
        model: the model.
        padded: whether it calls them with K and V of left-padded batches as they are, too.
    """

    def __init__(self, model: nn.Module, padded: bool = True) -> None:
        self.padded = padded
        modules = [sys.modules.get(name) for name in {type(m).__module__ for m in model.modules()}]
        name = scaled_dot_product_attention.__name__
        self._functions = [
            (module, name, getattr(module, name))
            for module in (mx.fast, base, sys.modules.get("mlx_vlm.models.base"), *modules)
            if hasattr(module, name)
        ]

    def unchanged(self) -> bool:
        """Whether all of them are what they were."""
        return all(getattr(module, name) is f for module, name, f in self._functions)

    def __deepcopy__(self, memo: dict) -> AttentionFunctions:
        return self


def install() -> None:
    """Replace MLX's function; a second call changes nothing."""
    mx.fast.scaled_dot_product_attention = scaled_dot_product_attention
