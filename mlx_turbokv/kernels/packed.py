"""Packed K and V as attention reads them, and the mask of left-padded sequences."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from ..centring.centre import Centre
from ..quant.layout import TILE, KVLayout


@cache
def empty_tiles() -> mx.array:
    """A body or a tail without rows."""
    array = mx.zeros((1, 1, 0, 1), mx.uint32)
    mx.eval(array)  # the server generates in a thread of its own, where nothing old is evaluated
    return array


class PackedKV(NamedTuple):
    """Packed rows of K and V: a large body that is never rewritten, and a small tail.

    Row p of the sequence lies in the body if p < n_body, else in the tail at p - n_body.

    Args:
        n_body: valid rows of the body, a multiple of 32; rows after them are stale.
        n_tail: valid rows of the tail; rows after them are stale or zero.
        centre: what was subtracted from the keys; None for keys that are not centred.
        left_padding: rows before position 0 of each sequence; None where there are none. It
            matters to centred keys, whose centre depends on the position.

    Shapes:
        body: [B, H, body tiles, layout.tile_words] uint32; ``empty_tiles()`` if n_body is 0.
        tail: [B, H, tail tiles, layout.tile_words] uint32; ``empty_tiles()`` if n_tail is 0.
        left_padding: [B] int32.
    """

    layout: KVLayout
    body: mx.array
    n_body: int
    tail: mx.array
    n_tail: int
    centre: Centre | None = None
    left_padding: mx.array | None = None

    def row_values(self, batch_size: int) -> int:
        """Values of K and V that one KV head has in ``batch_size`` sequences."""
        return batch_size * self.n_tokens * (self.layout.k_head_dim + self.layout.v_head_dim)

    @property
    def newest(self) -> mx.array:
        """The array that holds the newest rows."""
        return self.tail if self.n_tail else self.body

    @property
    def n_tokens(self) -> int:
        """Rows of the sequence."""
        return self.n_body + self.n_tail

    @property
    def n_packed(self) -> int:
        """Rows that are packed: all."""
        return self.n_tokens

    @property
    def tiles(self) -> mx.array:
        """Body and tail as one array, the last tile perhaps partly filled.

        Shapes:
            returns: [B, H, ceil(n_tokens / 32), layout.tile_words] uint32.
        """
        parts = []
        if self.n_body:
            parts.append(self.body[:, :, : self.n_body // TILE])
        if self.n_tail:
            parts.append(self.tail[:, :, : -(-self.n_tail // TILE)])
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


class PaddedCausal(mx.array):
    """The causal mask of left-padded sequences, with the left padding that it was made from.

    Kernels take the left padding, and the array is never computed; whatever else a model does with
    the mask works as with any array.

    Shapes:
        the array: [B, 1, L, n] bool; left_padding: [B] int32.
    """

    left_padding: mx.array
