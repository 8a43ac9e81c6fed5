"""A packed cache that settles near-ties as another back-end's cache did.

Two back-ends round differently, by 1e-7 and the like. Where a value lies that near to a decision
boundary, both codes are right, but the next layer sees another input, and a model of thirty layers
amplifies it: windows end up some 1e-2 nats apart with nothing wrong in either. So one run is the
witness of the other. Every code of the witness must be right for this run's row up to a near-tie,
and every scale right for those codes, computed in float64, or it counts as wrong; the witness's
rows are then kept.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_turbokv.cache import TurboKVCache
from mlx_turbokv.quant.codebook import boundaries, codebook
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import TILE
from mlx_turbokv.quant.rotation import rotation_matrix, rotation_width
from mlx_turbokv.quant.tiles import UNITS, tiles_to_rows

# how near to a boundary a tie lies: in units of the group's root mean square, or of a q8_0 step
TURBO_TIE = 1e-3
Q8_TIE = 0.05
# relative difference of two fp16 scales of the same codes: two units in the last place
SCALE_TIE = 2**-9


class WitnessedCache(TurboKVCache):
    """Packs with its own back-end, then takes the witness's rows.

    The witness must hold the rows before this is given them. It may hold more, and grow in between.

    ``n_codes``, ``n_turned`` and ``n_wrong`` count codes, those that differ between the two, and
    the witness's codes and scales that no tie explains.
    """

    def __init__(self, witness: TurboKVCache, backend: str) -> None:
        super().__init__(witness.k_format, witness.v_format, backend)
        self.witness = witness
        self.n_codes = self.n_turned = self.n_wrong = 0

    def _append(self, keys: mx.array, values: mx.array) -> None:
        n_before = self.size()
        super()._append(keys, values)
        ours, theirs = (self._rows_from(n_before, cache) for cache in (self, self.witness))
        for at, fmt, x in ((0, self.k_format, keys), (2, self.v_format, values)):
            if not fmt.is_f16:
                self._settle(fmt, x, ours[at : at + 2], theirs[at : at + 2])
        tiles, n_full = self.witness.packed.tiles, self.n_body // TILE
        if self.n_body:
            self.body = tiles[:, :, :n_full]
        if self.n_tail:
            self.tail = tiles[:, :, n_full : -(-self.size() // TILE)]

    def _rows_from(self, n_before: int, cache: TurboKVCache) -> list[mx.array]:
        """A cache's rows after the first ``n_before``, of which this one holds as many."""
        tile, row = divmod(n_before, TILE)
        rows = tiles_to_rows(cache.packed.tiles[:, :, tile:], self.layout)
        return [part[:, :, row : self.size() - tile * TILE] for part in rows]

    def _settle(self, fmt: KVFormat, x: mx.array, ours: list, theirs: list) -> None:
        codes, theirs_codes = (_codes(part[0], fmt) for part in (ours, theirs))
        scales = np.array(theirs[1]).astype(np.float64)
        rows = np.array(x.astype(mx.float32)).astype(np.float64)
        width = fmt.group_width(rows.shape[-1])
        if fmt.is_turbo:
            turn = rotation_matrix(rotation_width(rows.shape[-1])).astype(np.float64)
            rows = (rows.reshape(*rows.shape[:-1], -1, len(turn)) @ turn.T).reshape(rows.shape)
            groups = rows.reshape(*rows.shape[:-1], -1, width)
            unit = np.sqrt(np.square(groups).mean(axis=-1))
            edges = np.concatenate([[-np.inf], boundaries(fmt.bits, width), [np.inf]])
            low, high, tie = edges[theirs_codes], edges[theirs_codes + 1], TURBO_TIE
            expected = _unbiased(rows, theirs_codes, fmt, width)
        else:
            unit, tie = scales, Q8_TIE
            low, high = theirs_codes - 0.5, theirs_codes + 0.5
            expected = np.array(ours[1]).astype(np.float64)
        values = rows / np.repeat(np.where(unit == 0, 1, unit), width, axis=-1)
        self.n_codes += codes.size
        self.n_turned += int((codes != theirs_codes).sum())
        self.n_wrong += int((~((values >= low - tie) & (values <= high + tie))).sum())
        self.n_wrong += int((~(np.abs(scales - expected) <= SCALE_TIE * expected)).sum())


def _unbiased(rows: np.ndarray, codes: np.ndarray, fmt: KVFormat, width: int) -> np.ndarray:
    """The scales <y, y> / <y, c> of rotated rows y with these codes, [..., groups]."""
    levels = codebook(fmt.bits, width).astype(np.float64)[codes]
    grouped = (*rows.shape[:-1], -1, width)
    rows, levels = rows.reshape(grouped), levels.reshape(grouped)
    energy, fit = np.square(rows).sum(axis=-1), (rows * levels).sum(axis=-1)
    return np.where(energy == 0, 0, energy / np.where(fit == 0, 1, fit))


def _codes(units: mx.array, fmt: KVFormat) -> np.ndarray:
    """The codes of units, [..., D], signed where the format's are."""
    if not fmt.is_turbo:
        return np.array(units).view(np.int8).astype(np.int32)
    units = np.array(units).astype(np.int32)[..., None]
    codes = (units >> (fmt.bits * np.arange(UNITS[fmt.bits][1]))) & ((1 << fmt.bits) - 1)
    return codes.reshape(*codes.shape[:-2], -1)
