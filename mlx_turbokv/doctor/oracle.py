"""Packing and attention in float64 NumPy, to check the reference ops against."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..kernels.agreement import codes_and_scales
from ..kernels.packed import PackedKV, empty_tiles
from ..kernels.segments import AnyKV, SegmentedKV
from ..quant.codebook import boundaries, codebook
from ..quant.formats import KVFormat
from ..quant.rotation import rotation_matrix, rotation_width
from ..quant.tiles import tiles_to_rows


def quantized(x: np.ndarray, fmt: KVFormat) -> tuple[np.ndarray, np.ndarray]:
    """Codes and fp16 scales of rows.

    Shapes:
        x: [..., head_dim] float64; returns: codes [..., head_dim], scales [..., groups].
    """
    dim = x.shape[-1]
    width = fmt.group_width(dim)
    rows = rotated(x) if fmt.is_turbo else x
    codes, scales = [], []
    for first in range(0, dim, width):
        group = rows[..., first : first + width]
        if fmt.has_codebook:
            code, scale = _turbo(group, fmt.bits, width)
        else:
            scale = _q8_scale(np.abs(group).max(axis=-1))
            step = scale.astype(np.float64)[..., None]
            code = np.round(group / np.where(step > 0, step, np.inf)).clip(-127, 127)
        codes.append(code.astype(np.int64))
        scales.append(scale)
    return np.concatenate(codes, axis=-1), np.stack(scales, axis=-1)


def dequantized(codes: np.ndarray, scales: np.ndarray, fmt: KVFormat) -> np.ndarray:
    """Rows in the original basis, float64.

    Shapes:
        codes: [..., head_dim]; scales: [..., groups]; returns: [..., head_dim].
    """
    dim = codes.shape[-1]
    width = fmt.group_width(dim)
    levels = codebook(fmt.bits, width).astype(np.float64)[codes] if fmt.has_codebook else codes
    rows = levels * np.repeat(scales.astype(np.float64), width, axis=-1)[..., :dim]
    return rotated(rows, inverse=True) if fmt.is_turbo else rows


def parts_of(packed: AnyKV) -> list[tuple[PackedKV, slice]]:
    """Rows by layout, in order and without the centre, and which of them attention reads.

    Protected rows must be of one sequence without left padding, its body end where the tail begins.
    """
    if isinstance(packed, PackedKV):
        return [(packed._replace(centre=None), slice(0, packed.n_tokens))]
    none, first, start, n = empty_tiles(), packed.n_sink, packed.tail_start, packed.n_tail
    return [
        (PackedKV(packed.sink_layout, none, 0, packed.sink, first), slice(0, first)),
        (PackedKV(packed.layout, none, 0, packed.body, start), slice(first, start)),
        (PackedKV(packed.tail_layout, none, 0, packed.tail, n), slice(0, n)),
    ]


def rows_of(packed: AnyKV) -> list[np.ndarray]:
    """K and V of packed rows, float64, from their codes and scales; others follow as they are.

    Protected rows must be as ``parts_of`` says.

    Shapes:
        returns: [B, H, n, k_head_dim] and [B, H, n, v_head_dim].
    """
    parts = [[rows[:, :, own] for rows in _part_rows(part)] for part, own in parts_of(packed)]
    found = [np.concatenate(sides, axis=2) for sides in zip(*parts)]
    if packed.centre is not None:
        with mx.stream(mx.cpu):
            anchors = packed.centre.rows(0, packed.n_packed, packed.left_padding)
            found[0] = found[0] + float64(anchors)
            if packed.centre.scales is not None:
                found[0] = found[0] / float64(packed.centre.scales.of_dims)[:, None]
    if isinstance(packed, SegmentedKV) and packed.fresh is not None:
        fresh = map(float64, packed.fresh)
        found = [np.concatenate(sides, axis=2) for sides in zip(found, fresh)]
    return found


def _part_rows(part: PackedKV) -> list[np.ndarray]:
    layout, n = part.layout, part.n_tokens
    with mx.stream(mx.cpu):
        rows = tiles_to_rows(part.tiles, layout)
        mx.eval(rows)
    found = []
    for side, fmt in (("k", layout.k_format), ("v", layout.v_format)):
        if fmt.is_f16:
            with mx.stream(mx.cpu):
                values = getattr(rows, side)[:, :, :n].view(getattr(mx, layout.dtype))
            found.append(float64(values))
        else:
            found.append(dequantized(*codes_and_scales(rows, side, fmt.bits, n), fmt))
    return found


def attention(
    queries: mx.array,
    packed: AnyKV,
    scale: float,
    seen: mx.array | None = None,
    sinks: mx.array | None = None,
) -> np.ndarray:
    """Softmax attention over packed rows.

    Shapes:
        queries: [B, n_heads, L, D]; sinks: [n_heads]; seen: [L, n] bool.
        returns: [B, n_heads, L, v_head_dim] float64.
    """
    q, rows = float64(queries), rows_of(packed)
    keys, values = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in rows)
    scores = q @ keys.swapaxes(-1, -2) * scale
    if seen is not None:
        scores = np.where(np.array(seen), scores, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(float64(sinks)[:, None, None], (*scores.shape[:-1], 1))
        scores = np.concatenate([scores, sink], axis=-1)
    top = np.maximum(scores.max(axis=-1, keepdims=True), -1e30)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights[..., : keys.shape[2]] @ values / np.where(total == 0, 1, total)


def float64(x: mx.array) -> np.ndarray:
    """An array of any dtype in float64."""
    with mx.stream(mx.cpu):
        return np.array(x.astype(mx.float32)).astype(np.float64)


def _q8_scale(largest: np.ndarray) -> np.ndarray:
    """The largest magnitude over 127; upwards where it is no normal fp16 number."""
    steps = np.where(largest > 2.0**-25, np.ceil(largest / 127 * 2.0**24), 0)
    return np.where(largest < 127 * 2.0**-14, steps / 2.0**24, largest / 127).astype(np.float16)


def _turbo(y: np.ndarray, bits: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    energy = np.square(y).sum(axis=-1)
    raw = np.sqrt(energy / y.shape[-1])
    normal = y / np.where(raw > 0, raw, np.inf)[..., None]
    codes = np.searchsorted(boundaries(bits, width).astype(np.float64), normal)
    levels = codebook(bits, width).astype(np.float64)[codes]
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = energy / (y * levels).sum(axis=-1)
    return codes, np.where(energy > 0, scale, 0).astype(np.float16)


def rotated(x: np.ndarray, inverse: bool = False) -> np.ndarray:
    """Rows in the basis that turbo formats store, or back from it.

    Shapes:
        x: [..., head_dim]; returns the same.
    """
    matrix = rotation_matrix(rotation_width(x.shape[-1])).astype(np.float64)
    groups = x.reshape(*x.shape[:-1], -1, len(matrix))
    return (groups @ (matrix if inverse else matrix.T)).reshape(x.shape)
