"""GGUF files taken apart and put together, right or wrong, without the gguf package."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?",
         U64: "Q", I64: "q", F64: "d"}  # fmt: skip
ALIGNMENT = 32


@dataclass
class Tensor:
    name: bytes
    dims: list[int]
    kind: int
    offset: int


@dataclass
class Parts:
    """fields: (type, value) by key; of an array the value is (type of its values, values)."""

    fields: dict[bytes, tuple[int, Any]] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    n_fields: int | None = None  # what the file announces; None: what it has
    n_tensors: int | None = None


def read_parts(path: Path) -> Parts:
    content, at = path.read_bytes(), 24
    n_tensors, n_fields = struct.unpack_from("<QQ", content, 8)

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, content, at)
        at += struct.calcsize("<" + code)
        return value

    def text() -> bytes:
        nonlocal at
        n = take("Q")
        at += n
        return content[at - n : at]

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:
            inner, n = take("I"), take("Q")
            return inner, [value(inner) for _ in range(n)]
        return take(CODES[kind])

    parts = Parts()
    for _ in range(n_fields):
        key, kind = text(), take("I")
        parts.fields[key] = kind, value(kind)
    for _ in range(n_tensors):
        name, n_dims = text(), take("I")
        dims = [take("Q") for _ in range(n_dims)]
        parts.tensors.append(Tensor(name, dims, take("I"), take("Q")))
    parts.data = content[at + -at % ALIGNMENT :]
    return parts


def write_parts(path: Path, parts: Parts) -> Path:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def value(kind: int, x: Any) -> bytes:
        if kind == STRING:
            return text(x)
        if kind == ARRAY:
            inner, values = x
            start = struct.pack("<IQ", inner, len(values))
            if inner in CODES:
                return start + struct.pack(f"<{len(values)}{CODES[inner]}", *values)
            return start + b"".join(value(inner, y) for y in values)
        return struct.pack("<" + CODES[kind], x)

    n_tensors = len(parts.tensors) if parts.n_tensors is None else parts.n_tensors
    n_fields = len(parts.fields) if parts.n_fields is None else parts.n_fields
    out = [b"GGUF", struct.pack("<IQQ", 3, n_tensors, n_fields)]
    for key, (kind, x) in parts.fields.items():
        out += [text(key), struct.pack("<I", kind), value(kind, x)]
    for tensor in parts.tensors:
        out += [text(tensor.name), struct.pack("<I", len(tensor.dims))]
        out += [struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims)]
        out += [struct.pack("<IQ", tensor.kind, tensor.offset)]
    head = b"".join(out)
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + parts.data)
    return path


def edit(path: Path, change: Callable[[Parts], object]) -> Path:
    """Change a file's parts in place; it stays well-formed."""
    parts = read_parts(path)
    change(parts)
    return write_parts(path, parts)
