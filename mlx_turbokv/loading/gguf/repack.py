"""ggml's block formats repacked as MLX's affine quantised weights, without requantising.

Both hold ``value = scale * code + bias`` with one scale for 32 values of a row, so the codes move
as they are. Q4_K and Q5_K multiply two numbers to get a scale; that product is rounded once, to
``dtype``. Q6_K and the other types have scales for 16 values, which MLX has not.
"""

from __future__ import annotations

import numpy as np

GROUP_SIZE = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}


def repack(data: np.ndarray, kind: str, dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed weights, scales and biases of one tensor.

    Shapes:
        data: [rows, bytes of a row] uint8, as ``gguf.ReaderTensor.data``.
        returns: [rows, columns * bits / 32] uint32, and twice [rows, columns / 32] ``dtype``.
    """
    with np.errstate(over="ignore"):
        codes, scales, biases = _UNPACK[kind](data)
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    rows = data.shape[0]
    words = np.ascontiguousarray(codes).reshape(rows, -1).view("<u4")
    return words, scales.reshape(rows, -1), biases.reshape(rows, -1)


def _pack_nibbles(low_first: np.ndarray) -> np.ndarray:
    """[..., 32] 4-bit codes in order -> [..., 16] bytes, the earlier code in the low half."""
    return low_first[..., 0::2] | (low_first[..., 1::2] << 4)


def _pack_five_bits(codes: np.ndarray) -> np.ndarray:
    """[..., 32] 5-bit codes in order -> [..., 20] bytes: eight codes in five, lowest bits first."""
    eights = np.zeros((*codes.shape[:-1], 4), "<u8")
    for i in range(8):
        eights |= codes[..., i::8].astype("<u8") << np.uint64(5 * i)
    return eights.view(np.uint8).reshape(*eights.shape, 8)[..., :5].reshape(*codes.shape[:-1], 20)


def _halves(nibbles: np.ndarray) -> np.ndarray:
    """ggml keeps the first half of a block in the low nibbles and the second in the high ones."""
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)


def _half_floats(blocks: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2").astype(np.float32)


def _q4_0(data: np.ndarray):
    blocks = data.reshape(data.shape[0], -1, 18)
    scales = _half_floats(blocks, 0)
    return _pack_nibbles(_halves(blocks[..., 2:])), scales, -8 * scales


def _q4_1(data: np.ndarray):
    blocks = data.reshape(data.shape[0], -1, 20)
    codes = _pack_nibbles(_halves(blocks[..., 4:]))
    return codes, _half_floats(blocks, 0), _half_floats(blocks, 2)


def _q5_0(data: np.ndarray):
    blocks = data.reshape(data.shape[0], -1, 22)
    scales = _half_floats(blocks, 0)
    return _pack_five_bits(_with_fifth_bits(blocks[..., 2:])), scales, -16 * scales


def _q5_1(data: np.ndarray):
    blocks = data.reshape(data.shape[0], -1, 24)
    codes = _pack_five_bits(_with_fifth_bits(blocks[..., 4:]))
    return codes, _half_floats(blocks, 0), _half_floats(blocks, 2)


def _with_fifth_bits(blocks: np.ndarray) -> np.ndarray:
    """[..., 4 bytes of fifth bits, then 16 of nibbles] -> [..., 32] codes."""
    fifth = np.unpackbits(blocks[..., :4], axis=-1, bitorder="little")
    return _halves(blocks[..., 4:]) | fifth << 4


def _q8_0(data: np.ndarray):
    blocks = data.reshape(data.shape[0], -1, 34)
    scales = _half_floats(blocks, 0)
    # A signed code plus 128 is the same byte with its top bit inverted.
    return blocks[..., 2:] ^ np.uint8(128), scales, -128 * scales


def _q4_k(data: np.ndarray):
    blocks = data.reshape(data.shape[0], -1, 144)
    return _pack_nibbles(_chunks(blocks[..., 16:])), *_k_scales(blocks)


def _q5_k(data: np.ndarray):
    blocks = data.reshape(data.shape[0], -1, 176)
    # bit i of a byte is the fifth bit of a code of the i-th group of 32
    fifth = np.unpackbits(blocks[..., 16:48, None], axis=-1, bitorder="little").swapaxes(-1, -2)
    codes = _chunks(blocks[..., 48:]) | fifth << 4
    return _pack_five_bits(codes), *_k_scales(blocks)


def _chunks(nibbles: np.ndarray) -> np.ndarray:
    """[..., 128] bytes, in which 32 have two groups of codes -> [..., 8, 32] codes."""
    chunks = nibbles.reshape(*nibbles.shape[:2], 4, 32)
    return np.stack([chunks & 15, chunks >> 4], axis=-2).reshape(*nibbles.shape[:2], 8, 32)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of the eight groups of a block, packed in 6 bits after two factors."""
    six_bits = blocks[..., 4:16]
    first, second, third = six_bits[..., 0:4], six_bits[..., 4:8], six_bits[..., 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return _half_floats(blocks, 0) * scales, -_half_floats(blocks, 2) * minima


_UNPACK = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q5_K": _q5_k,
    "Q8_0": _q8_0,
}  # fmt: skip
