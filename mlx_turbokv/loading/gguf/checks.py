"""``gguf.GGUFReader`` with checks for damaged files.

The reader does not compare lengths with the file's size, and can loop endlessly on a damaged one.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, ReaderField

from ...errors import InputError

_MAX_DIMS = 4
_MAX_ARRAY = 1 << 20  # the reader takes microseconds a value; vocabularies have 300,000 or less


def checked_reader(path: Path) -> GGUFReader:
    """Open a GGUF file.

    Raises:
        InputError: not a GGUF file, of another version, big-endian, or damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    if start[:4] != b"GGUF":
        raise InputError(f"{path} is not a GGUF file (it does not begin with 'GGUF').")
    version = struct.unpack("<I", start[4:].ljust(4, b"\0"))[0]
    if len(start) == 8 and version not in (2, 3):
        raise InputError(
            f"{path} has GGUF version {version}; accepted are 2 and 3 (little-endian)."
        )
    try:
        return _CheckedReader(path)
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"The GGUF file {path} is damaged or cut short: {error}.") from error


class _CheckedReader(GGUFReader):
    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"byte {end:,} is wanted of {len(self.data):,}")
        return super()._get(offset, dtype, count, *order, **options)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if length > _MAX_ARRAY:
                raise ValueError(f"a metadata field is an array of {length:,} values")
        return super()._get_field_parts(orig_offs, raw_type)

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        field = super()._get_tensor_info_field(orig_offs)
        n_dims, kind = int(field.parts[2][0]), int(field.parts[4][0])
        if not 1 <= n_dims <= _MAX_DIMS:
            raise ValueError(f"tensor {field.name} has {n_dims} dimensions")
        if kind not in GGML_QUANT_SIZES:
            raise InputError(
                f"Tensor {field.name} of {self.path} has the unknown type {kind}; accepted are the "
                "types of the gguf package."
            )
        return field

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        for field in fields:
            offset = int(field.parts[5][0])
            if offset % int(self.alignment) or start_offs + offset > len(self.data):
                raise ValueError(f"tensor {field.name} starts at byte {start_offs + offset:,}")
        super()._build_tensors(start_offs, fields)
