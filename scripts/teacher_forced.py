"""Teacher-forced codes: a packed cache that takes over the codes of another back-end's cache.

Two back-ends differ by rounding, by about 1e-7. A value that lies as near to a decision boundary of
the quantiser may get either code, the next layer then has another input, and thirty layers amplify
it: losses of a window differ by about 1e-2 nats with no error in either back-end. So the second
back-end quantises its own rows, checks the codes and scales of the first in float64 (they must be
right for its own rows up to a near-tie), and goes on with the first's codes.
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

# largest distance of a near-tie from a boundary: in the group's root mean square, or q8_0 steps
TURBO_TIE = 1e-3
Q8_TIE = 0.05
# relative difference of two fp16 scales of the same codes: two units in the last place
SCALE_TIE = 2**-9


class TeacherForcedCache(TurboKVCache):
    """Packs with its own back-end, counts differences, then keeps the source's rows.

    ``n_codes``: codes compared; ``n_differing``: codes that differ; ``n_wrong``: codes and scales
    of the source that no near-tie explains.

    Args:
        source: the other back-end's cache, which has the rows before this cache is given them; it
            may have more, and grow in between.
    """

    def __init__(self, source: TurboKVCache, backend: str) -> None:
        super().__init__(source.k_format, source.v_format, backend)
        self.source = source
        self.n_codes = self.n_differing = self.n_wrong = 0

    def _append(self, keys: mx.array, values: mx.array) -> None:
        n_before = self.size()
        super()._append(keys, values)
        ours, theirs = (self._rows_from(n_before, cache) for cache in (self, self.source))
        for at, fmt, x in ((0, self.k_format, keys), (2, self.v_format, values)):
            if not fmt.is_f16:
                self._count(fmt, x, ours[at : at + 2], theirs[at : at + 2])
        tiles, n_full = self.source.packed.tiles, self.n_body // TILE
        if self.n_body:
            self.body = tiles[:, :, :n_full]
        if self.n_tail:
            self.tail = tiles[:, :, n_full : -(-self.size() // TILE)]

    def _rows_from(self, n_before: int, cache: TurboKVCache) -> list[mx.array]:
        """A cache's rows after the first ``n_before``, of which this one holds as many."""
        tile, row = divmod(n_before, TILE)
        rows = tiles_to_rows(cache.packed.tiles[:, :, tile:], self.layout)
        return [part[:, :, row : self.size() - tile * TILE] for part in rows]

    def _count(self, fmt: KVFormat, x: mx.array, ours: list, theirs: list) -> None:
        """Count the source's codes and scales that differ, or are wrong, for the rows ``x``."""
        codes, theirs_codes = (_codes(part[0], fmt) for part in (ours, theirs))
        scales = np.array(theirs[1]).astype(np.float64)
        rows = np.array(x.astype(mx.float32)).astype(np.float64)
        width = fmt.group_width(rows.shape[-1])
        if fmt.is_turbo:
            rotation = rotation_matrix(rotation_width(rows.shape[-1])).astype(np.float64)
            blocks = rows.reshape(*rows.shape[:-1], -1, len(rotation))
            rows = (blocks @ rotation.T).reshape(rows.shape)
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
        self.n_differing += int((codes != theirs_codes).sum())
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
