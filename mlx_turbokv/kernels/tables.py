"""What the kernels' template parameters and constant tables are for a format and a head_dim."""

from __future__ import annotations

import weakref
from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..centring.centre import Centre
from ..quant.codebook import boundaries, codebook
from ..quant.formats import CODEBOOK_BITS, KVFormat
from ..quant.layout import KVLayout
from ..quant.rotation import base_order, hadamard, rotation_width, signs

ANCHOR_INPUTS = ("centre", "cos_sin_table", "left_padding")
MAX_HEAD_DIM = 512
MAX_LEVELS = 64
MAX_ORDER = 36
RAW = {"float16": 0, "bfloat16": 1, "float32": 2}


class TensorParameters(NamedTuple):
    """Template parameters of K or V, as metal/common.h names them.

    Args:
        bits: of a code: 2 to 6 turbo, 8 q8_0 and turbo8, 16 or 32 raw rows.
        group: values to a scale; 0 for raw rows.
        width: of the rotation; 0 where there is none.
    """

    bits: int
    group: int
    dim: int
    width: int


@cache
def tensor_parameters(layout: KVLayout) -> tuple[TensorParameters, TensorParameters]:
    """K's and V's parameters."""
    return (
        _parameters(layout.k_format, layout.k_head_dim, layout.itemsize),
        _parameters(layout.v_format, layout.v_head_dim, layout.itemsize),
    )


def _parameters(fmt: KVFormat, head_dim: int, itemsize: int) -> TensorParameters:
    bits = 8 * itemsize if fmt.is_f16 else fmt.bits
    width = rotation_width(head_dim) if fmt.is_turbo else 0
    return TensorParameters(bits, fmt.group_width(head_dim), head_dim, width)


def uncovered(layout: KVLayout) -> str | None:
    """Why the kernels cannot handle a layout, or None where they can."""
    for name, dim in (("k_head_dim", layout.k_head_dim), ("v_head_dim", layout.v_head_dim)):
        if dim > MAX_HEAD_DIM:
            return f"{name} {dim} is above {MAX_HEAD_DIM}"
    return None


def template(layout: KVLayout) -> list[tuple[str, int]]:
    """Template values of K and V: those of Tensor in metal/common.h."""
    k, v = tensor_parameters(layout)
    values = [("KB", k.bits), ("KG", k.group), ("KD", k.dim), ("KW", k.width)]
    return values + [("VB", v.bits), ("VG", v.group), ("VD", v.dim), ("VW", v.width)]


@cache
def constants(tensor: TensorParameters) -> mx.array:
    """The tables of K or V, evaluated: signs, dense Hadamard matrix, levels, boundaries.

    Shapes:
        returns: at least [276] uint32, in the order of metal/common.h.
    """
    sign_bits = np.zeros(4, np.uint32)
    rows = np.zeros((MAX_ORDER, 2), np.uint32)
    columns = np.zeros((MAX_ORDER, 2), np.uint32)
    levels = np.zeros(2 * MAX_LEVELS, np.float32)
    has_codebook = tensor.width > 0 and tensor.bits in CODEBOOK_BITS
    if tensor.width:
        sign_bits[:] = _bits(signs(tensor.width)[None] < 0, 4)[0]
        order = base_order(tensor.width)
        matrix = hadamard(order)
        rows[:order] = _bits(matrix < 0, 2)
        columns[:order] = _bits(matrix.T < 0, 2)
    if has_codebook:
        levels[: 1 << tensor.bits] = codebook(tensor.bits, tensor.group)
        levels[MAX_LEVELS : MAX_LEVELS + (1 << tensor.bits) - 1] = boundaries(
            tensor.bits, tensor.group
        )
    table = [sign_bits, rows.reshape(-1), columns.reshape(-1), levels.view(np.uint32)]
    if has_codebook:
        table.append(_lookup(tensor.bits, codebook(tensor.bits, tensor.group)))
    array = mx.array(np.concatenate(table))
    mx.eval(array)  # the server generates in a thread of its own, where nothing new is evaluated
    return array


def _lookup(bits: int, levels: np.ndarray) -> np.ndarray:
    """Entries of metal/lut.h: pairs of levels in half for each value of two codes' bits.

    Shapes:
        levels: [2**bits]; returns: uint32.
    """
    halves = levels.astype(np.float16)
    if bits == 6:
        return np.repeat(halves, 2).view(np.uint32)
    codes = np.arange(1 << 2 * bits)[:, None] >> bits * np.arange(2)
    return halves[codes & ((1 << bits) - 1)].view(np.uint32).reshape(-1)


def _bits(flags: np.ndarray, n_words: int) -> np.ndarray:
    """Rows of booleans as bits of 32-bit words, the first lowest."""
    padded = np.zeros((flags.shape[0], 32 * n_words), np.uint32)
    padded[:, : flags.shape[1]] = flags
    weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
    return (padded.reshape(-1, n_words, 32) * weights).sum(axis=-1, dtype=np.uint32)


@lru_cache(maxsize=256)
def int_array(*numbers: int) -> mx.array:
    """Run-time parameters, evaluated; a step's layers share one array."""
    array = mx.array(numbers, mx.int32)
    mx.eval(array)
    return array


def anchor_inputs(
    centre: Centre | None, n_rows: int, left_padding: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """The centre, the table for ``n_rows`` rows, and the left padding; placeholders where absent.

    Shapes:
        left_padding: [B] int32.
    """
    if centre is None:
        return no_centre(), no_tiles(), placeholder()
    return centre.kernel_rows, centre.table(n_rows), padding_input(left_padding)


def padding_input(left_padding: mx.array | None) -> mx.array:
    """Left padding as kernels take it.

    Shapes:
        left_padding: [B] int32; returns: at least [8] int32.
    """
    return placeholder() if left_padding is None else at_least_eight(left_padding)


@cache
def no_centre() -> mx.array:
    """Stands for a centre that is absent."""
    array = mx.zeros((8,), mx.float32)
    mx.eval(array)
    return array


@cache
def placeholder() -> mx.array:
    """Stands where an optional input is absent."""
    return int_array(0, 0, 0, 0, 0, 0, 0, 0)


@cache
def no_tiles() -> mx.array:
    """Stands for a body or a tail that is absent."""
    return constants(TensorParameters(8, 32, 8, 0))


_extended: dict[int, tuple[weakref.ref, mx.array]] = {}


def at_least_eight(array: mx.array) -> mx.array:
    """``array`` with zeros up to 8 elements: MLX passes fewer in another address space.

    The result is kept for as long as ``array`` lives: a step's layers share one left padding.
    """
    if array.size >= 8:
        return array
    key = id(array)
    known = _extended.get(key)
    if known is not None and known[0]() is array:
        return known[1]
    extended = mx.concatenate([array, mx.zeros((8 - array.size,), array.dtype)])
    _extended[key] = weakref.ref(array, lambda _: _extended.pop(key, None)), extended
    return extended
