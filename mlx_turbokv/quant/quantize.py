"""Quantise rows and read them back, in plain mx ops.

Scales are fp16. The codes of a turbo group are those of its values divided by their root mean
square; the scale that is stored is <y, y> / <y, c> for values y and levels c, which is unbiased.

Groups that are too loud for fp16 saturate. The smallest scale is SMALLEST_SCALE: what is not above
half of it, the largest magnitude of a q8_0 group or the scale of a turbo group, is stored as zero.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from .codebook import boundaries, codebook
from .formats import KVFormat
from .rotate import rotate
from .tiles import UNITS, units_from_codes

FP16_MAX = 65504.0
FP16_NORMAL = 2.0**-14  # below it fp16 has multiples of SMALLEST_SCALE
SMALLEST_SCALE = 2.0**-24
# of q8_0 rows in fp16: the next scale times 127 is no fp16 number
FP16_MOST_Q8 = 515.5
# magnitudes of turbo rows are cut to this, so that the squares of no finite row overflow
MOST_ROTATED = 2.0**50
_UNSIGNED = {2: mx.uint16, 4: mx.uint32}


@cache
def _constant(kind: str, *args: int) -> mx.array:
    """An evaluated array of one of the tables: it may be used from any thread."""
    if kind == "codebook":
        array = mx.array(codebook(*args))
    else:
        array = mx.array(boundaries(*args))
    mx.eval(array)
    return array


def _levels(units: mx.array, bits: int, width: int, head_dim: int) -> mx.array:
    """Codebook levels of a row's units.

    Two neighbouring levels are looked up as one 64-bit word, and along an axis: MLX's CPU gather
    takes six times as long for the same words. (Four at once would need half the lookups, in a
    table that does not stay in the innermost cache: four times as long each.)

    Shapes:
        units: [..., units in a row]; returns: [..., head_dim] float32.
    """
    pairs = units
    if UNITS[bits][1] == 4:
        pairs = mx.stack([units & ((1 << 2 * bits) - 1), units >> (2 * bits)], axis=-1)
    words = mx.take_along_axis(_pair_table(bits, width), pairs.reshape(-1), axis=0)
    return words.view(mx.float32).reshape(*units.shape[:-1], head_dim)


@cache
def _pair_table(bits: int, width: int) -> mx.array:
    """The levels of every two codes, two float32 in a word: [2**(2 bits)] uint64."""
    codes = np.arange(1 << 2 * bits)[:, None] >> (bits * np.arange(2))
    levels = codebook(bits, width).astype(np.float32)[codes & ((1 << bits) - 1)]
    table = mx.array(levels.view(np.uint64)[:, 0])
    mx.eval(table)  # evaluated, it may be used from any thread
    return table


def quantize(x: mx.array, fmt: KVFormat) -> tuple[mx.array, mx.array]:
    """Quantise rows of K or V, rotation included.

    A row that holds a NaN or an infinity reads back as NaN, and no other row is touched.

    Shapes:
        x: [..., head_dim].
        returns: units [..., units in a row], scales [..., groups in a row] float16.
    """
    head_dim = x.shape[-1]
    if fmt.is_f16:
        return x.view(_UNSIGNED[x.dtype.size]), mx.zeros((*x.shape[:-1], 0), mx.float16)
    if fmt.is_turbo:
        return quantize_rotated(rotate(bounded(x), head_dim), fmt)
    most = FP16_MOST_Q8 if x.dtype == mx.float16 else FP16_MAX
    return _q8_codes(x.astype(mx.float32), most)


def quantize_rotated(y: mx.array, fmt: KVFormat) -> tuple[mx.array, mx.array]:
    """Quantise rows that are in the rotated basis already, in a turbo format.

    Shapes:
        y: [..., head_dim] float32; returns as ``quantize``.
    """
    if not fmt.has_codebook:
        return _q8_codes(y, FP16_MAX)
    codes, scales = _turbo_codes(y, fmt)
    return units_from_codes(codes, fmt.bits), scales


def values(units: mx.array, scales: mx.array, fmt: KVFormat, head_dim: int, dtype: mx.Dtype):
    """What packed rows stand for; turbo rows in the rotated basis.

    Args:
        dtype: the model's dtype, that of f16 rows.

    Shapes:
        units: [..., units in a row]; scales: [..., groups in a row].
        returns: [..., head_dim] float32.
    """
    if fmt.is_f16:
        return units.view(dtype).astype(mx.float32)
    width = fmt.group_width(head_dim)
    if fmt.has_codebook:
        levels = _levels(units, fmt.bits, width, head_dim)
    else:
        levels = units.view(mx.int8).astype(mx.float32)
    return _scaled(levels, scales.astype(mx.float32), width)


def _scaled(levels: mx.array, scales: mx.array, width: int) -> mx.array:
    """Multiply each group of ``width`` values by its scale; the last group may be shorter."""
    if scales.shape[-1] == 1:
        return levels * scales
    if levels.shape[-1] % width:
        return levels * mx.repeat(scales, width, axis=-1)[..., : levels.shape[-1]]
    grouped = levels.reshape(*levels.shape[:-1], -1, width) * scales[..., None]
    return grouped.reshape(levels.shape)


def _groups(x: mx.array, width: int) -> mx.array:
    """[..., D] to [..., groups, width]; a shorter last group is filled up with zeros."""
    if ragged := -x.shape[-1] % width:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, ragged)])
    return x.reshape(*x.shape[:-1], -1, width)


def _stored(scales: mx.array, most: float = FP16_MAX) -> mx.array:
    """Scales as fp16; those above ``most`` saturate, NaN stays."""
    return mx.minimum(scales, most).astype(mx.float16)


def bounded(x: mx.array) -> mx.array:
    """Values that can be rotated and squared in float32; infinities become NaN."""
    if x.dtype == mx.float16:
        return x
    x = x.astype(mx.float32)
    return mx.where(mx.isinf(x), mx.nan, mx.clip(x, -MOST_ROTATED, MOST_ROTATED))


def _q8_scales(largest: mx.array, most: float) -> mx.array:
    """fp16 scales that map the largest magnitude of a group to 127.

    Where fp16 has few digits they are rounded up, so that no code is cut: the integers are exact,
    and no float32 is subnormal, which GPUs may take for zero.
    """
    few_digits = largest < 127 * FP16_NORMAL
    steps = mx.ceil(mx.where(few_digits, largest, 0) / SMALLEST_SCALE).astype(mx.int32)
    steps = mx.where(largest > SMALLEST_SCALE / 2, (steps + 126) // 127, 0)
    small = steps.astype(mx.uint16).view(mx.float16)  # subnormals count from zero
    return mx.where(few_digits, small, _stored(largest / 127, most))


def _q8_codes(x: mx.array, most: float) -> tuple[mx.array, mx.array]:
    """int8 codes, as uint8, of groups of 32, and scales of at most ``most``."""
    groups = _groups(x, 32)
    largest = mx.abs(groups).max(axis=-1)
    scales = _q8_scales(mx.where(mx.isinf(largest), mx.nan, largest), most)
    step = scales.astype(mx.float32)[..., None]
    codes = mx.round(groups / mx.where(step > 0, step, mx.inf))
    codes = mx.clip(mx.where(mx.isnan(codes), 0, codes), -127, 127).astype(mx.int8)
    return codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].view(mx.uint8), scales


def _turbo_codes(y: mx.array, fmt: KVFormat) -> tuple[mx.array, mx.array]:
    """Codes and scales of rotated rows."""
    head_dim = y.shape[-1]
    width = fmt.group_width(head_dim)
    # a ragged last group counts its own values only
    sizes = mx.array([min(width, head_dim - g) for g in range(0, head_dim, width)], mx.float32)
    groups = _groups(y, width)
    energy = mx.square(groups).sum(axis=-1)
    rms = mx.sqrt(energy / sizes)
    normal = groups / mx.where(rms > 0, rms, mx.inf)[..., None]
    thresholds = _constant("boundaries", fmt.bits, width)
    codes = (normal[..., None] > thresholds).sum(axis=-1).astype(mx.uint8)
    scales = _unbiased_scales(groups, energy, codes, fmt.bits, head_dim)
    return codes.reshape(*y.shape[:-1], -1)[..., :head_dim], _stored(scales)


# Of four rules for the scale the unbiased one has the lowest KLD: scripts/group_scale.py of commit
# e1a90eb compares them.
def _unbiased_scales(
    groups: mx.array, energy: mx.array, codes: mx.array, bits: int, head_dim: int
) -> mx.array:
    """<y, y> / <y, c> of each group y with levels c."""
    width = groups.shape[-1]
    levels = _constant("codebook", bits, width)[codes]
    if groups.shape[-2] * width > head_dim:  # nothing is stored for the end of a ragged group
        levels = levels * (mx.arange(groups.shape[-2] * width).reshape(-1, width) < head_dim)
    return mx.where(energy == 0, 0, energy / (groups * levels).sum(axis=-1))
