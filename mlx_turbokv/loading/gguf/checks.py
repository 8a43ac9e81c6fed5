"""Checks of a GGUF file's lengths before ``gguf.GGUFReader`` reads it.

The reader does not check lengths and can loop endlessly on a damaged file. This pass over the
header visits every length once and never reads past the end of the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from ...errors import InputError

_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_ARRAY_DEPTH = 4
_MAX_DIMS = 4


class _DamagedError(Exception):
    """The header is not valid, or longer than the file."""


def check_gguf(path: Path) -> None:
    """Check the header of a GGUF file and the extents of its tensors.

    Raises:
        InputError: not a GGUF file, of another version, big-endian, or damaged.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file (it does not begin with 'GGUF').")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Header(data, path).check()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    except _DamagedError as error:
        raise InputError(f"The GGUF file {path} is damaged or cut short: {error}.") from error


class _Header:
    """Reads a header from start to end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.size = len(data)
        self.path = path
        self.at = 4
        self.alignment = 32

    def check(self) -> None:
        version = self.number("<I")
        if version not in (2, 3):
            raise InputError(
                f"{self.path} has GGUF version {version}; accepted are 2 and 3 (little-endian)."
            )
        n_tensors, n_fields = self.number("<Q"), self.number("<Q")
        for _ in range(n_fields):
            key = self.text()
            kind = self.number("<I")
            if key == b"general.alignment" and kind == 4:
                self.alignment = self.number("<I")
                if self.alignment == 0 or self.alignment & (self.alignment - 1):
                    raise _DamagedError(f"its alignment is {self.alignment}")
            else:
                self.value(kind, 0)
        extents = [self.tensor() for _ in range(n_tensors)]
        start = -(-self.at // self.alignment) * self.alignment
        for name, offset, n_bytes in extents:
            if offset % self.alignment or start + offset + n_bytes > self.size:
                raise _DamagedError(
                    f"tensor {name} ends at byte {start + offset + n_bytes:,} of {self.size:,}"
                )

    def value(self, kind: int, depth: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        elif kind == _ARRAY and depth < _MAX_ARRAY_DEPTH:
            inner, length = self.number("<I"), self.number("<Q")
            if inner in _SCALAR_BYTES:
                self.skip(length * _SCALAR_BYTES[inner])
            else:
                for _ in range(length):
                    self.value(inner, depth + 1)
        else:
            raise _DamagedError(f"a metadata value has the unknown type {kind}")

    def tensor(self) -> tuple[str, int, int]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text().decode("utf-8", "replace")
        n_dims = self.number("<I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise _DamagedError(f"tensor {name} has {n_dims} dimensions")
        dims = [self.number("<Q") for _ in range(n_dims)]
        kind, offset = self.number("<I"), self.number("<Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise InputError(
                f"Tensor {name} of {self.path} has the unknown type {kind}; accepted are the "
                "types of the gguf package."
            ) from error
        if dims[0] % block:
            raise _DamagedError(f"the rows of tensor {name} are no whole blocks of {block}")
        return name, offset, math.prod(dims) // block * block_bytes

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, start)[0]

    def text(self) -> bytes:
        length = self.number("<Q")
        start = self.at
        self.skip(length)
        return self.data[start : self.at]

    def skip(self, n_bytes: int) -> None:
        if self.at + n_bytes > self.size:
            raise _DamagedError(f"its header wants more than the file's {self.size:,} bytes")
        self.at += n_bytes
