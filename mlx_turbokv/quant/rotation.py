"""Random Hadamard rotations for the head_dims that models use.

A head is rotated whole up to 128 dimensions; a wider one in the fewest equal groups that can be
rotated. One group of width w = m * 2**k is rotated by y = (H_m (x) H_2**k) (s * x) / sqrt(w): a
Hadamard matrix, Kronecker product of a Paley matrix of order m and Sylvester's, after random
signs. (Signs after the transform, as TurboQuant+ has too, would change nothing: its codebooks are
symmetric.)

Sources: arXiv 2504.19874; R. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933).
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np

from ..errors import InputError

MAX_WIDTH = 128
MAX_HEAD_DIM = 1 << 16  # no model comes near it
# order m: (prime q, Paley's construction). I gives order q + 1, II gives 2 (q + 1).
PALEY = {12: (11, 1), 20: (19, 1), 28: (13, 2), 36: (17, 2)}


def base_order(width: int) -> int | None:
    """The m of width = m * 2**k, m in (1, 12, 20, 28, 36), or None where there is no such m."""
    odd = width
    while odd > 1 and odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1 if width >= 1 else None
    order = 4 * odd
    return order if order in PALEY and width % order == 0 else None


@cache
def rotation_width(head_dim: int) -> int:
    """Width of the rotation that a head of ``head_dim`` values gets.

    Raises:
        InputError: no split of the head into equal groups of at most 128 can be rotated.
    """
    if 8 <= head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0:
        first = -(-head_dim // MAX_WIDTH)
        for n_groups in range(first, 2 * first + 1):
            width = head_dim // n_groups
            if head_dim % n_groups == 0 and width % 4 == 0 and base_order(width):
                return width
    raise InputError(
        f"head_dim {head_dim} cannot be rotated: accepted are multiples of 8 that split into equal "
        "groups of m * 2**k <= 128 values, m one of 1, 12, 20, 28, 36."
    )


@cache
def hadamard(order: int) -> np.ndarray:
    """The Hadamard matrix used for ``order`` = m * 2**k.

    Shapes:
        returns: [order, order] int8, entries +1 and -1.

    Raises:
        ValueError: there is no matrix of this order here.
    """
    m = base_order(order)
    if m is None:
        raise ValueError(f"no Hadamard matrix of order {order} here")
    matrix = np.ones((1, 1), np.int8) if m == 1 else _paley(*PALEY[m])
    sylvester = np.array([[1, 1], [1, -1]], np.int8)
    while len(matrix) < order:
        matrix = np.kron(matrix, sylvester)
    return matrix


def _paley(q: int, construction: int) -> np.ndarray:
    """Paley's Hadamard matrix from the quadratic residues of the prime q."""
    residues = {i * i % q for i in range(1, q)}
    character = [0] + [1 if i in residues else -1 for i in range(1, q)]
    jacobsthal = np.array([[character[(i - j) % q] for j in range(q)] for i in range(q)])
    core = np.zeros((q + 1, q + 1), int)
    core[1:, 1:] = jacobsthal
    core[0, 1:] = 1
    if construction == 1:
        core[1:, 0] = -1
        matrix = core + np.eye(q + 1, dtype=int)
    else:
        core[1:, 0] = 1
        identity = np.eye(q + 1, dtype=int)
        matrix = np.kron(core, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]])
    return matrix.astype(np.int8)


@cache
def signs(width: int) -> np.ndarray:
    """The fixed random signs: bit i of SHA-256("mlx_turbokv rotation signs"), set means -1.

    Shapes:
        returns: [width] float32, entries +1 and -1.
    """
    digest = np.frombuffer(hashlib.sha256(b"mlx_turbokv rotation signs").digest(), np.uint8)
    bits = np.unpackbits(digest, bitorder="little")[:width]
    return (1 - 2 * bits.astype(np.float32)).astype(np.float32)


@cache
def rotation_matrix(width: int) -> np.ndarray:
    """The orthogonal matrix R of one group, y = R x.

    Shapes:
        returns: [width, width] float32.
    """
    matrix = hadamard(width).astype(np.float64) * signs(width) / np.sqrt(width)
    return matrix.astype(np.float32)
