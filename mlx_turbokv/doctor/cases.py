"""Inputs of the checks of one variant, the same on every machine."""

from __future__ import annotations

import zlib

import mlx.core as mx
import numpy as np

from ..centring.centre import Centre
from ..centring.rope import RopeFrequencies
from ..centring.scales import PairScales
from ..kernels import reference
from ..kernels.packed import PackedKV
from ..kernels.segments import SegmentedKV
from ..quant.layout import TILE, KVLayout, protected_layout
from .variants import Variant

N_KV_HEADS = 2
N_BODY, N_TAIL = 64, 37
N_ROWS = N_BODY + N_TAIL
N_FIRST = TILE  # protected tokens, besides the tail's


class Case:
    """Keys and values of a variant, and the random numbers of its checks.

    Shapes:
        keys, values: [1, N_KV_HEADS, N_ROWS, head_dim] in the variant's dtype.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant, self.layout = variant, variant.layout
        self.dtype = getattr(mx, variant.dtype)
        self.rng = np.random.default_rng(zlib.crc32(repr(variant).encode()))
        self.keys = self._rows(variant.k_head_dim)
        self.values = self._rows(variant.v_head_dim)
        self.centre: Centre | None = None
        if variant.centred:
            self._add_constant_part()

    def normal(self, *shape: int) -> mx.array:
        """Normal values in the variant's dtype."""
        return mx.array(self.rng.standard_normal(shape).astype(np.float32)).astype(self.dtype)

    def _rows(self, dim: int) -> mx.array:
        """Rows of different magnitudes, one of them zero."""
        rows = self.rng.standard_normal((1, N_KV_HEADS, N_ROWS, dim))
        rows *= np.exp(self.rng.standard_normal((1, N_KV_HEADS, N_ROWS, 1)))
        rows[:, :, 3] = 0
        return mx.array(rows.astype(np.float32)).astype(self.dtype)

    def _add_constant_part(self) -> None:
        """Add a constant part to the keys, larger than what varies, and divide them by scales."""
        dim = self.variant.k_head_dim
        mu = 4 * self.rng.standard_normal((N_KV_HEADS, dim)).astype(np.float32)
        rope = RopeFrequencies.from_arguments(dim, dim, False, 1e4)
        logs = self.rng.normal(scale=0.4, size=(N_KV_HEADS, dim // 2)).astype(np.float32)
        scales = PairScales(mx.array(np.exp(logs)), rope)
        self.centre = Centre(mx.array(mu), rope, "doctor", 1, True, scales)
        with mx.stream(mx.cpu):
            keys = self.keys + self.centre.rows(0, N_ROWS)
            self.keys = scales.unscaled(keys).astype(self.dtype)
            mx.eval(self.keys)

    def rows(self, first: int, last: int) -> tuple[mx.array, mx.array]:
        """Keys and values from row ``first`` to before ``last``."""
        return self.keys[:, :, first:last], self.values[:, :, first:last]

    def centre_at(self, first: int) -> dict:
        """Arguments of pack for the centre of rows from ``first`` on."""
        return {} if self.centre is None else {"centre": self.centre, "first": first}

    def reference_tiles(
        self, first: int = 0, last: int = N_ROWS, layout: KVLayout | None = None
    ) -> mx.array:
        """Rows that the reference packed, on the CPU."""
        with mx.stream(mx.cpu):
            rows = self.rows(first, last)
            tiles = reference.pack(*rows, layout or self.layout, **self.centre_at(first))
            mx.eval(tiles)
        return tiles

    def packed(self) -> PackedKV:
        """A body and a tail that the reference packed."""
        body, tail = self.reference_tiles(0, N_BODY), self.reference_tiles(N_BODY)
        return PackedKV(self.layout, body, N_BODY, tail, N_TAIL, self.centre)

    def segmented(self, n_fresh: int = 0, newest: bool = True) -> SegmentedKV:
        """The same with the first tokens and, if ``newest``, the tail as protected rows.

        Args:
            n_fresh: of the newest rows those that are not packed.
        """
        fine, n = protected_layout(self.layout), N_ROWS - n_fresh
        own = fine if newest else self.layout
        first = self.reference_tiles(0, N_FIRST, fine)
        body, tail = self.reference_tiles(0, N_BODY), self.reference_tiles(N_BODY, n, own)
        fresh = self.rows(n, N_ROWS) if n_fresh else None
        return SegmentedKV(
            self.layout, own, fine, first, N_FIRST, n, body, N_BODY, tail, N_BODY, n - N_BODY,
            (N_BODY,), (0,), self.centre, fresh,
        )  # fmt: skip
