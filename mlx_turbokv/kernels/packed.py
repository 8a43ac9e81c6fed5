"""What attention is given: packed K and V, how much of them is valid, and where padding ends."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..centring.centre import Centre
from ..quant.layout import TILE, KVLayout


class PackedKV(NamedTuple):
    """Packed rows of K and V: a large body that is never rewritten, and a small tail.

    Row p of the sequence lies in the body if p < n_body, else in the tail at p - n_body.

    Shapes:
        body: [B, H, body tiles, layout.tile_words] uint32, or None.
        tail: [B, H, tail tiles, layout.tile_words] uint32, or None.

    Args:
        n_body: valid rows of the body, a multiple of 32; rows after them are stale.
        n_tail: valid rows of the tail; rows after them are stale or zero.
        centre: what was taken out of the keys; None where they are stored whole.
        padding: rows before position 0 of each sequence, for ``centre``; None where there are none.
    """

    layout: KVLayout
    body: mx.array | None
    n_body: int
    tail: mx.array | None
    n_tail: int
    centre: Centre | None = None
    padding: tuple[int, ...] | None = None

    @property
    def n_tokens(self) -> int:
        """Rows of the sequence."""
        return self.n_body + self.n_tail

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


def heads_at_once(n_heads: int, bytes_each: int, limit: int) -> int:
    """How many KV heads to dequantise at a time: what ``limit`` bytes hold, evenly cut."""
    most = max(1, limit // bytes_each)
    return -(-n_heads // -(-n_heads // most))


class PaddedCausal(mx.array):
    """The causal mask of left-padded sequences; it knows the first valid row of each.

    An array like any other where a model uses it otherwise. Kernels that read packed rows take
    ``starts`` instead, and the array is never computed.

    Shapes:
        the array: [B, 1, L, n] bool; starts: [B] int32, followed by zeros up to 8.
    """

    starts: mx.array
