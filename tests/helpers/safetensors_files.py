"""Safetensors files taken apart and put together, right or wrong, without MLX."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path


def read_parts(path: Path) -> tuple[dict, bytes]:
    """The header and the data of a file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(path: Path, header: dict | str, data: bytes) -> Path:
    """A file with this header, as it is."""
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)
    return path


def read_arrays(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    """(type, shape, bytes) by name, and the metadata."""
    header, data = read_parts(path)
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = entry["dtype"], entry["shape"], data[begin:end]
    return arrays, metadata


def write_arrays(
    path: Path, arrays: dict[str, tuple[str, list[int], bytes]], metadata: dict
) -> Path:
    """A well-formed file of these arrays, whatever they hold."""
    header: dict = {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in arrays.items():
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]
        }  # fmt: skip
        data += content
    return write_parts(path, header, data)


def edit(path: Path, change: Callable[[dict, dict], object]) -> Path:
    """Change a file's arrays and metadata in place; it stays well-formed."""
    arrays, metadata = read_arrays(path)
    change(arrays, metadata)
    return write_arrays(path, arrays, metadata)
