"""Whether packed rows agree: their codes and scales, taken out of tiles and compared."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..quant.formats import KVFormat
from ..quant.tiles import UNITS, Rows

# codes may differ by one where a value lies at a decision boundary: this share of them
CODES_SHARE = 1e-3
SCALE_ULPS = 1


class CheckError(Exception):
    """A comparison that did not hold."""


def compare_rows(
    side: str, fmt: KVFormat, codes: np.ndarray, scales: np.ndarray, wanted: np.ndarray,
    wanted_scales: np.ndarray, accepted: float = CODES_SHARE,
) -> float:  # fmt: skip
    """The share of codes that differ.

    Args:
        accepted: share of codes that may differ by one.

    Raises:
        CheckError: more than rounding explains.
    """
    off = np.abs(codes - wanted)
    share = float((off > 0).mean())
    if fmt.is_f16:
        if share:
            raise CheckError(f"{side}: {share:.1%} of the f16 values differ")
        return 0.0
    if off.max() > 1 or share > accepted:
        raise CheckError(f"{side}: {share:.1%} of the codes differ, by up to {off.max()} levels")
    ulps = np.abs(scales.view(np.uint16).astype(int) - wanted_scales.view(np.uint16).astype(int))
    ulps[off.any(axis=-1)] = 0  # another code has another scale
    if ulps.max() > SCALE_ULPS:
        raise CheckError(f"{side}: scales differ by up to {ulps.max()} ulps")
    return share


def codes_from_units(units: mx.array, bits: int) -> np.ndarray:
    """Single codes, in the order of the dims; q8_0's are signed.

    Shapes:
        units: [..., units in a row]; returns: [..., head_dim] int64.
    """
    found = np.array(units).astype(np.int64)
    _, per_unit = UNITS[bits]
    codes = (found[..., None] >> (bits * np.arange(per_unit))) & ((1 << bits) - 1)
    codes = codes.reshape(*found.shape[:-1], -1)
    return np.where(codes > 127, codes - 256, codes) if bits == 8 else codes


def codes_and_scales(
    rows: Rows, side: str, bits: int, n_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and fp16 scales of the first rows of ``side``, "k" or "v"."""
    units, scales = getattr(rows, side), getattr(rows, f"{side}_scales")
    return codes_from_units(units[:, :, :n_rows], bits), np.array(scales[:, :, :n_rows])
