"""``gguf.GGUFReader`` with checks for damaged files.

The reader does not compare lengths with the file's size, and can loop endlessly on a damaged one.
It takes an object and many microseconds for each value of an array, which is read at once here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, ReaderField

from ...errors import InputError, short

_MAX_DIMS = 4
_MAX_FIELDS = 1 << 14  # files have some dozens
_MAX_TENSORS = 1 << 16
_MAX_VALUES = 1 << 22  # of all arrays; a vocabulary of 300,000 has 1.5 million with its merges
_MAX_STRINGS = 1 << 21
_LENGTH = struct.Struct("<Q")


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
    except (
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
        RecursionError,
        struct.error,
    ) as error:
        raise InputError(
            f"The GGUF file {path} is damaged or cut short: {str(error)[:300]}."
        ) from error


class _CheckedReader(GGUFReader):
    def __init__(self, path: Path) -> None:
        self.path = path
        self._n_values = self._n_strings = 0
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"byte {end:,} is wanted of {len(self.data):,}")
        return super()._get(offset, dtype, count, *order, **options)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            return self._get_array(orig_offs)
        return super()._get_field_parts(orig_offs, raw_type)

    def _get_array(self, start: int) -> Any:
        """Size, parts, indices of the values among the parts, and types of an array."""
        raw_type, length = self._get(start, np.uint32), self._get(start + 4, np.uint64)
        kind, n, at = GGUFValueType(raw_type[0]), int(length[0]), start + 12
        self._n_values += n
        if self._n_values > _MAX_VALUES:
            raise ValueError(f"its metadata has arrays of {self._n_values:,} values")
        if kind == GGUFValueType.ARRAY:
            raise ValueError("a metadata field is an array of arrays")
        types = [GGUFValueType.ARRAY, kind]
        if kind != GGUFValueType.STRING:
            values = self._get(at, self.gguf_scalar_to_np[kind], n)
            return 12 + values.nbytes, [raw_type, length, values], [2], types
        parts = self._get_strings(at, n)
        size = 8 * n + sum(part.nbytes for part in parts)
        return 12 + size, [raw_type, length, *parts], list(range(2, 2 + n)), types

    def _get_strings(self, at: int, n: int) -> list[memoryview]:
        self._n_strings += n
        if self._n_strings > _MAX_STRINGS or 8 * n > len(self.data) - at:
            raise ValueError(f"its metadata has {self._n_strings:,} strings")
        data: Any = self.data
        view, parts = memoryview(data), []
        for _ in range(n):
            (length,) = _LENGTH.unpack_from(view, at)
            at += 8 + length
            if at > len(view):
                raise ValueError(f"byte {at:,} is wanted of {len(view):,}")
            parts.append(view[at - length : at])
        return parts

    def _build_fields(self, offs: int, count: int) -> int:
        if count > _MAX_FIELDS:
            raise ValueError(f"it announces {int(count):,} metadata fields")
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs: int, count: int) -> Any:
        if count > _MAX_TENSORS:
            raise ValueError(f"it announces {int(count):,} tensors")
        return super()._build_tensor_info(offs, count)

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        field = super()._get_tensor_info_field(orig_offs)
        n_dims, kind = int(field.parts[2][0]), int(field.parts[4][0])
        if not 1 <= n_dims <= _MAX_DIMS or not all(0 < n < 1 << 31 for n in field.parts[3]):
            raise ValueError(f"tensor {short(field.name)} has no dimensions that can be")
        if kind not in GGML_QUANT_SIZES:
            raise InputError(
                f"Tensor {short(field.name)} of {self.path} has the unknown type {kind}; accepted "
                "are the types of the gguf package."
            )
        return field

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        for field in fields:
            offset = int(field.parts[5][0])
            if offset % int(self.alignment) or start_offs + offset > len(self.data):
                raise ValueError(
                    f"tensor {short(field.name)} starts at byte {start_offs + offset:,}"
                )
        super()._build_tensors(start_offs, fields)
        end = start_offs
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.data_offset):
            if tensor.data_offset < end:
                raise ValueError(f"tensor {short(tensor.name)} overlaps another")
            end = tensor.data_offset + tensor.n_bytes
