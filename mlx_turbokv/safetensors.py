"""The header of a safetensors file, compared with the file before anything of it is loaded.

MLX reads a file's data lazily, and does not notice that it ends too early or that a shape asks for
other bytes than there are.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from .files import check_regular, parse_json

ITEMSIZE = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
            "F16": 2, "BF16": 2, "F32": 4, "C64": 8}  # fmt: skip
MOST_HEADER_BYTES = 32 << 20
MOST_DIMS = 8
MOST_IN_DIM = (1 << 31) - 1


class Header(NamedTuple):
    """What a file says that it holds.

    Args:
        arrays: type and shape by name.
        metadata: text by name.
    """

    arrays: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read a header; the bytes that it speaks of are exactly those that the file has.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        ValueError: it is not a safetensors file, or damaged.
    """
    size = check_regular(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(f"its header would have {length:,} bytes of {size:,}")
        header = parse_json(file.read(length), _without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("its metadata is not text by name")
    arrays, extents = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        if end - begin != math.prod(shape) * ITEMSIZE[dtype]:
            raise ValueError(f"its array {name[:60]!r} has another size than its shape")
        arrays[name] = dtype, shape
        extents.append((begin, end))
    at = 0
    for begin, end in sorted(extents):
        if begin != at:
            raise ValueError("its arrays overlap or leave gaps")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"its arrays have {at:,} bytes of {size - 8 - length:,}")
    return Header(arrays, metadata)


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, begin, end) of an array."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ValueError(f"its array {name[:60]!r} has no type that is known")
    if not _sizes(shape, MOST_IN_DIM) or len(shape) > MOST_DIMS:
        raise ValueError(f"its array {name[:60]!r} has no shape")
    if not _sizes(offsets, 1 << 62) or len(offsets) != 2:
        raise ValueError(f"its array {name[:60]!r} lies nowhere")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _sizes(value: Any, most: int) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= most for n in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names something twice")
    return found
