"""Where the bytes of packed K and V rows lie.

Tokens of one KV head are stored in tiles of 32. A tile is 32-bit words, little endian, in four
regions:

1. K codes. A row's codes form a bitstream, dim 0 lowest. It is cut into columns of 16 bytes and,
   for what remains, of 8, 4, 2 and 1; a column holds its bytes of all 32 tokens in turn. A kernel
   whose lane is a token reads 512 contiguous bytes a column and sums without other lanes.
2. K scales: fp16, [group][32 tokens].
3. V codes. Four neighbouring dims of all 32 tokens form a bitstream, token 0 lowest, cut into
   columns of 16 bytes; a column holds the 16 bytes of every four dims in turn. A kernel whose lane
   is four dims reads contiguous bytes here too.
4. V scales: fp16, [group][32 tokens].

Nothing is padded. Rows not written yet are zero bits, which read as zeros. The arrangement follows
measurements of decode kernels: the usual one, a row after another, reads 3.7 times slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from .formats import KVFormat, check_head_dim

TILE = 32
VEC4 = 4
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class KVLayout:
    """The stored layout of one layer's K and V.

    Args:
        k_format, v_format: what a row holds.
        k_head_dim, v_head_dim: values in a row of K and of V.
        dtype: the model's dtype, that of f16 rows: float16, bfloat16 or float32.

    Raises:
        InputError: a head_dim cannot be packed or rotated.
    """

    k_format: KVFormat
    v_format: KVFormat
    k_head_dim: int
    v_head_dim: int
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_head_dim(self.k_format, self.k_head_dim)
        check_head_dim(self.v_format, self.v_head_dim)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Worked out once: launches are looked up by their layout at every step and layer."""
        dims = self.k_head_dim, self.v_head_dim
        return hash((self.k_format, self.v_format, dims, self.dtype))

    @property
    def itemsize(self) -> int:
        """Bytes of one value of an f16 row."""
        return ITEMSIZE[self.dtype]

    @cached_property
    def is_raw(self) -> bool:
        """Whether rows of K or V are stored in the model's dtype (f16)."""
        return self.k_format.is_f16 or self.v_format.is_f16

    @cached_property
    def k_row_bytes(self) -> int:
        """Bytes of one K row."""
        return self.k_format.row_bytes(self.k_head_dim, self.itemsize)

    @cached_property
    def v_row_bytes(self) -> int:
        """Bytes of one V row."""
        return self.v_format.row_bytes(self.v_head_dim, self.itemsize)

    @cached_property
    def tile_words(self) -> int:
        """32-bit words of one tile of 32 tokens."""
        return TILE * (self.k_row_bytes + self.v_row_bytes) // 4

    @cached_property
    def k_words(self) -> int:
        """Words of a tile that hold K; V's follow."""
        return TILE * self.k_row_bytes // 4

    @cached_property
    def offsets(self) -> tuple[int, int, int, int, int]:
        """Byte offsets in a tile: K codes, K scales, V codes, V scales, and the end."""
        k_codes = TILE * self.k_format.code_bytes(self.k_head_dim, self.itemsize)
        v_codes = TILE * self.v_format.code_bytes(self.v_head_dim, self.itemsize)
        k_end, end = TILE * self.k_row_bytes, 4 * self.tile_words
        return 0, k_codes, k_end, k_end + v_codes, end

    @cached_property
    def k_columns(self) -> tuple[int, ...]:
        """Widths in bytes of the columns that a K row's codes are cut into."""
        n_bytes = self.k_format.code_bytes(self.k_head_dim, self.itemsize)
        return (16,) * (n_bytes // 16) + tuple(w for w in (8, 4, 2, 1) if n_bytes & w)

    @cached_property
    def v_code_bits(self) -> int:
        """Bits of one stored V value; 16 or 32 for f16 rows."""
        return 8 * self.itemsize if self.v_format.is_f16 else self.v_format.bits

    @cached_property
    def bits_per_value(self) -> float:
        """Bits per value over K and V together, scales included."""
        return 8 * (self.k_row_bytes + self.v_row_bytes) / (self.k_head_dim + self.v_head_dim)


@cache
def shared_layout(
    k_format: KVFormat, v_format: KVFormat, k_head_dim: int, v_head_dim: int, dtype: str
) -> KVLayout:
    """One object for all layers of a layout, so that comparing two takes no time.

    Raises:
        InputError: a head_dim cannot be packed or rotated.
    """
    return KVLayout(k_format, v_format, k_head_dim, v_head_dim, dtype)


@cache
def protected_layout(layout: KVLayout) -> KVLayout:
    """The layout of protected rows, which is in the same basis."""
    formats = layout.k_format.protected, layout.v_format.protected
    return shared_layout(*formats, layout.k_head_dim, layout.v_head_dim, layout.dtype)
