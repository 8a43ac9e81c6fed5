"""What one stored row of K or V is, and how many bits it takes.

The formats follow TurboQuant+ (arXiv 2504.19874 and TheTom/turboquant_plus) and ggml's q8_0.
A row is the K or V vector of one token and one KV head: integer codes packed tight, and one
fp16 scale for each group of values. turbo8 is q8_0 of rotated rows.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..checked import of
from ..errors import InputError, short
from .rotation import MAX_HEAD_DIM, rotation_width

Q8_BITS, Q8_GROUP = 8, 32
CODEBOOK_BITS = (2, 3, 4, 5, 6)
FORMAT_NAMES = ("f16", "q8_0", *(f"turbo{bits}" for bits in (*CODEBOOK_BITS, Q8_BITS)))
_FORMATS = (
    ("f16", 16, None), ("q8_0", Q8_BITS, None), ("turbo", Q8_BITS, None),
    *(("turbo", bits, group) for bits in CODEBOOK_BITS for group in (None, 32)),
)  # fmt: skip
_TURBO = re.compile(r"turbo([2-6])(?::(32))?|turbo8")
# names of llama.cpp (q4_0, iq4_nl, bf16), of floats (fp8_e4m3), of turbo formats (tbq3_0), or bits
_OTHER = re.compile(
    r"(?:[a-z]{1,6}|)_?([1-9]\d?)(?:[-_ ]?bits?|_[a-z0-9_]{1,6}|:\d{1,3})?", re.ASCII
)


@dataclass(frozen=True)
class KVFormat:
    """The storage format of K or V in one layer.

    Args:
        kind: ``"f16"`` (the model's own dtype, untouched), ``"q8_0"`` or ``"turbo"``.
        bits: bits of one code: 16, 8, or 2 to 6.
        group: values that share one scale; None means the natural group (32 where codes have 8
            bits, the rotation's width for turbo2 to turbo6).

    Raises:
        InputError: there is no such format.
    """

    kind: str
    bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        given = self.kind, self.bits, self.group
        exact = type(self.bits) is int and type(self.group) in (int, type(None))
        if not exact or given not in _FORMATS:
            kind, bits, group = (short(x) for x in given)
            raise InputError(
                f"KV format kind {kind}, bits {bits}, group {group} is not accepted: give a "
                "format's name to KVFormat.parse."
            )

    @classmethod
    def parse(cls, name: str) -> KVFormat:
        """Read a format's name, such as ``q8_0``, ``turbo3`` or ``turbo2:32``.

        Raises:
            InputError: the name is none of FORMAT_NAMES, nor turbo2:32 to turbo6:32.
        """
        NAME("KV format", name)
        text = name.strip().lower()
        if text == "f16":
            return cls("f16", 16)
        if text == "q8_0":
            return cls("q8_0", Q8_BITS)
        if match := _TURBO.fullmatch(text):
            group = int(match[2]) if match[2] else None
            return cls("turbo", int(match[1] or Q8_BITS), group)
        nearest = nearest_format(text)
        hint = f"the nearest is {nearest}; " if nearest else ""
        raise InputError(
            f"Unknown KV format {short(name)}: {hint}accepted are {', '.join(FORMAT_NAMES)} and "
            "turboN:32 (N 2 to 6)."
        )

    def __str__(self) -> str:
        if self.kind != "turbo":
            return self.kind
        return f"turbo{self.bits}" + (f":{self.group}" if self.group else "")

    @property
    def is_turbo(self) -> bool:
        """Whether rows are rotated before they are quantised."""
        return self.kind == "turbo"

    @property
    def has_codebook(self) -> bool:
        """Whether codes stand for Lloyd-Max levels, and not for integers or the values as such."""
        return self.is_turbo and self.bits != Q8_BITS

    @property
    def is_f16(self) -> bool:
        """Whether rows are stored as the model made them."""
        return self.kind == "f16"

    @property
    def protected(self) -> KVFormat:
        """The format that protected rows have where others have this one: turbo8 for turbo."""
        return KVFormat("turbo", Q8_BITS) if self.is_turbo else self

    def group_width(self, head_dim: int) -> int:
        """Values that share one scale; 0 where there is no scale (f16)."""
        if self.is_f16:
            return 0
        if not self.has_codebook:
            return Q8_GROUP
        return self.group or rotation_width(head_dim)

    def n_groups(self, head_dim: int) -> int:
        """Scales in one row; the last group may be shorter than the others."""
        width = self.group_width(head_dim)
        return -(-head_dim // width) if width else 0

    def code_bytes(self, head_dim: int, itemsize: int = 2) -> int:
        """Bytes of one row's codes; ``itemsize`` is that of the model's dtype, for f16 rows."""
        return head_dim * (itemsize if self.is_f16 else self.bits) // (1 if self.is_f16 else 8)

    def row_bytes(self, head_dim: int, itemsize: int = 2) -> int:
        """Bytes of one row, codes and scales."""
        return self.code_bytes(head_dim, itemsize) + 2 * self.n_groups(head_dim)

    def bits_per_value(self, head_dim: int) -> float:
        """Bits that one value takes, its share of the scales included."""
        return 8 * self.row_bytes(head_dim) / head_dim


def nearest_format(text: str) -> str | None:
    """The format of about as many bits as one of llama.cpp's or another's, or of a like name."""
    if match := _OTHER.fullmatch(text):
        bits = int(match[1])
        if bits in (16, 32):
            return "f16"
        if 7 <= bits <= Q8_BITS:
            return "turbo8" if text.startswith("turbo") else "q8_0"
        if bits <= 6:
            return f"turbo{max(bits, CODEBOOK_BITS[0])}"
    return next(iter(difflib.get_close_matches(text[:60], FORMAT_NAMES, 1)), None)


NAME = of("the name of a KV format, such as 'q8_0'", str)
FORMAT = of(NAME.accepted, KVFormat, str)


def as_format(value: KVFormat | str) -> KVFormat:
    """Accept a format or its name.

    Raises:
        InputError: it is none.
    """
    return value if isinstance(value, KVFormat) else KVFormat.parse(value)


def check_head_dim(fmt: KVFormat, head_dim: int) -> None:
    """Check that rows of ``head_dim`` values can be stored in ``fmt``.

    Raises:
        InputError: the head_dim is no multiple of 8, or cannot be rotated.
    """
    if fmt.is_turbo:
        rotation_width(head_dim)
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise InputError(
            f"head_dim {head_dim} cannot be packed: a multiple of 8 up to {MAX_HEAD_DIM:,} is "
            "needed."
        )
