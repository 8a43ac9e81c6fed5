"""Seeded changes to well-formed files: other values and types, more and less, huge and nested."""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf_edit
import safetensors_files
from gguf_edit import ARRAY, BOOL, CODES, F32, F64, I32, STRING, U32, U64

INTEGERS = [-1, 0, 1, 2, 3, 7, 31, 32, 33, 64, 65, 255, 1000, 60_000, 2**31 - 1, 2**31, 2**32,
            2**53, 2**63 - 1]  # fmt: skip
FLOATS = [0.0, -0.0, 0.5, -1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", "0", "f16", "turbo2", "turbo99", "q8_0", "KVCache", "TurboKVCache", "CacheList",
         "BatchTurboKVCache", "TurboRotatingKVCache", "RotatingKVCache", "ArraysCache", "scalar",
         "string", "none", "llama", "gpt2", "float16", "bfloat16", "caf\u00e9 \U0001f600", "\0",
         "a b", "../..", "x" * 5000]  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any value of JSON."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind in (1, 2):
        return rng.choice(INTEGERS) * rng.choice([1, 1, -1])
    if kind == 3:
        return rng.choice(FLOATS)
    if kind in (4, 5):
        return rng.choice(TEXTS)
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(3))}
    nested: Any = 1
    for _ in range(rng.choice([10, 300])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def changed_json(document: Any, rng: random.Random) -> Any:
    """A document with one thing in it changed, removed, added or repeated."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = node if isinstance(node, dict) else range(len(node))
        for key in list(keys):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    if isinstance(document, (dict, list)):
        walk(document)
    if not places or rng.random() < 0.05:
        return value(rng)
    node, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice(TEXTS)] = value(rng)
    elif action == 1:
        node.insert(key, value(rng))
    elif action == 2 and isinstance(node, list):
        node.extend([node[key]] * rng.choice([1, 40]))
    else:
        node[key] = value(rng)
    return document


def changed_text(text: str, rng: random.Random) -> bytes:
    """A JSON text with its document changed, or the text itself."""
    action = rng.randrange(12)
    if action == 0:
        return text.encode()[: rng.randrange(len(text))]
    if action == 1:
        return b"[" * rng.choice([1, 500, 100_000])
    if action == 2:
        return b"\xef\xbb\xbf" + text.encode("utf-16" if rng.random() < 0.5 else "utf-8")
    if action == 3:
        content = bytearray(text.encode())
        content[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(content)
    if action == 4:
        return json.dumps(changed_json(json.loads(text), rng)).replace("0", "9" * 5000, 1).encode()
    return json.dumps(changed_json(json.loads(text), rng)).encode()


def change_safetensors(path: Path, rng: random.Random) -> None:
    """Change a file in place."""
    if rng.random() < 0.1:
        _change_container(path, rng)
        return
    arrays, metadata = safetensors_files.read_arrays(path)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if metadata and rng.random() < 0.35:
            _change_metadata(metadata, arrays, rng)
        elif arrays:
            _change_arrays(arrays, rng)
    safetensors_files.write_arrays(path, arrays, metadata)


def _change_container(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    action = rng.randrange(4)
    if action == 0:
        path.write_bytes(content[: rng.randrange(len(content))])
    elif action == 1:
        path.write_bytes(content + bytes(rng.choice([1, 8, 100_000])))
    elif action == 2:
        length = rng.choice([0, 1, 2**31, 2**40, 2**63, len(content)])
        path.write_bytes(struct.pack("<Q", length) + content[8:])
    else:
        header, data = safetensors_files.read_parts(path)
        safetensors_files.write_parts(path, json.dumps(changed_json(header, rng)), data)


def _change_metadata(metadata: dict, arrays: dict, rng: random.Random) -> None:
    key = rng.choice(list(metadata))
    action = rng.randrange(6)
    if action == 0:
        del metadata[key]
    elif action == 1:
        parts = key.split(".")
        parts[rng.randrange(len(parts))] = str(rng.choice([*INTEGERS, "x", "01", "-0"]))
        metadata[".".join(parts)] = metadata.pop(key)
    elif action == 2:
        metadata[key] = rng.choice([*TEXTS, *arrays])
    elif action == 3:
        metadata[key] = metadata[rng.choice(list(metadata))]
    else:
        name = rng.choice([k for k in metadata if k[:2] == "0."] or [key])
        try:
            metadata[name] = json.dumps(changed_json(json.loads(metadata[name]), rng))
        except ValueError:
            metadata[name] = json.dumps(value(rng))


def _change_arrays(arrays: dict, rng: random.Random) -> None:
    name = rng.choice(list(arrays))
    dtype, shape, content = arrays[name]
    action = rng.randrange(10)
    if action == 0:
        del arrays[name]
    elif action == 1:
        parts = name.split(".")
        parts[rng.randrange(len(parts))] = str(rng.choice([*INTEGERS, "x", "01"]))
        arrays[".".join(parts)] = arrays.pop(name)
    elif action == 2:
        other = rng.choice(list(arrays))
        arrays[name], arrays[other] = arrays[other], arrays[name]
    elif action == 3:
        arrays[name + rng.choice([".0", ".1.2", ".999999"])] = arrays[name]
    elif action in (4, 5):
        arrays[name] = _scalar(rng)
    elif action == 6:
        _nudge(arrays, rng)
    elif action == 7:
        sizes = [n for n in (1, 2, 4) if len(content) % n == 0]
        itemsize = rng.choice(sizes)
        kinds = {1: ["U8", "I8", "BOOL"], 2: ["F16", "BF16", "I16"], 4: ["F32", "U32", "I32"]}
        arrays[name] = rng.choice(kinds[itemsize]), [len(content) // itemsize], content
    elif action == 8 and shape:
        axis = rng.randrange(len(shape))
        n = rng.choice([0, 1, shape[axis] // 2, max(shape[axis] - 1, 0), 2 * shape[axis]])
        size = len(content) // max(shape[axis], 1) * n
        new = [*shape[:axis], n, *shape[axis + 1 :]]
        rng.shuffle(new) if rng.random() < 0.3 else None
        arrays[name] = dtype, new, (content * 2 + bytes(size))[:size]
    else:
        garbage = rng.choice([b"\xff", b"\0", b"\x7f\xc0", rng.randbytes(7)])
        arrays[name] = dtype, shape, (garbage * len(content))[: len(content)]


def _nudge(arrays: dict, rng: random.Random) -> None:
    """Another whole number near the one that is there."""
    names = [name for name, (dtype, shape, _) in arrays.items() if dtype == "I32" and not shape]
    if names:
        name = rng.choice(names)
        (number,) = struct.unpack("<i", arrays[name][2])
        number += rng.choice([1, -1, 8, -8, 32, -32, 64, 256])
        number = max(-(2**31), min(number, 2**31 - 1))
        arrays[name] = "I32", [], struct.pack("<i", number)


def _scalar(rng: random.Random) -> tuple[str, list[int], bytes]:
    kind = rng.randrange(5)
    if kind == 0:
        return "F32", [], struct.pack("<f", rng.choice(FLOATS))
    if kind == 1:
        return "BOOL", [], bytes([rng.randrange(2)])
    if kind == 2:
        text = rng.choice(TEXTS)
        return "I32", [len(text)], struct.pack(f"<{len(text)}i", *map(ord, text))
    if kind == 3:
        return (
            "I64",
            [],
            struct.pack("<q", rng.choice(INTEGERS) if rng.random() < 0.8 else -(2**63)),
        )
    number = rng.choice([n for n in INTEGERS if n < 2**31])
    return "I32", [], struct.pack("<i", number * rng.choice([1, 1, -1]))


def change_gguf(path: Path, rng: random.Random) -> None:
    """Change a file in place."""
    if rng.random() < 0.1:
        content = bytearray(path.read_bytes())
        if rng.random() < 0.5:
            del content[rng.randrange(len(content)) :]
        else:
            content[rng.randrange(min(len(content), 3000))] = rng.randrange(256)
        path.write_bytes(content)
        return
    parts = gguf_edit.read_parts(path)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.65:
            _change_fields(parts, rng)
        else:
            _change_tensors(parts, rng)
    gguf_edit.write_parts(path, parts)


def _change_fields(parts: gguf_edit.Parts, rng: random.Random) -> None:
    if not parts.fields:
        return
    key = rng.choice(list(parts.fields))
    kind, held = parts.fields[key]
    action = rng.randrange(8)
    if action == 0:
        del parts.fields[key]
    elif action == 1:
        parts.fields[rng.choice(EXTRA_FIELDS)] = _field(rng)
    elif action == 2:
        parts.n_fields = rng.choice([0, len(parts.fields) + 1, 2**20, 2**63])
    elif action == 3:
        parts.fields[key] = parts.fields[rng.choice(list(parts.fields))]
    elif action == 4 and kind == ARRAY and held[1]:
        inner, values = held[0], list(held[1])
        at = rng.randrange(len(values))
        if rng.random() < 0.5:
            values[at : at + rng.choice([1, 50])] = []
        else:
            values[at] = values[rng.randrange(len(values))]
        parts.fields[key] = ARRAY, (inner, values)
    elif action == 5 and kind in (U32, I32):
        parts.fields[key] = kind, rng.choice([n for n in INTEGERS if 0 <= n < 2**31])
    else:
        parts.fields[key] = _field(rng)


EXTRA_FIELDS = [
    b"llama.rope.scaling.type", b"llama.rope.scaling.factor", b"llama.rope.dimension_count",
    b"llama.rope.scaling.original_context_length", b"llama.attention.key_length",
    b"llama.attention.value_length", b"llama.expert_count", b"split.count", b"general.alignment",
    b"tokenizer.ggml.scores", b"tokenizer.ggml.eot_token_id", b"tokenizer.ggml.add_bos_token",
    b"tokenizer.ggml.add_eos_token", b"tokenizer.ggml.unknown_token_id", b"tokenizer.chat_template",
    b"llama.rope.scale_linear", b"tokenizer.ggml.add_space_prefix", b"x",
]  # fmt: skip


def _field(rng: random.Random, depth: int = 0) -> tuple[int, Any]:
    kind = rng.choice([U32, I32, F32, BOOL, STRING, ARRAY, U64, F64, rng.randrange(13)])
    if kind == STRING:
        return kind, rng.choice([rng.choice(TEXTS).encode(), b"linear", b"yarn", b"\xff\xfe"])
    if kind in (F32, F64):
        return kind, rng.choice([x for x in FLOATS if kind == F64 or abs(x) != 1e300])
    if kind == BOOL:
        return kind, rng.random() < 0.5
    if kind == ARRAY:
        inner, first = _field(rng, depth + 1) if depth < 3 else (U32, 1)
        return kind, (inner, [first] * rng.choice([0, 1, 2, 100, 2000]))
    size = struct.calcsize(CODES[kind])
    low, high = (0, 256**size) if CODES[kind].isupper() else (-(256**size) // 2, 256**size // 2)
    return kind, rng.choice([n for n in INTEGERS if low <= n < high])


def _change_tensors(parts: gguf_edit.Parts, rng: random.Random) -> None:
    if not parts.tensors:
        return
    tensor = rng.choice(parts.tensors)
    action = rng.randrange(8)
    if action == 0:
        parts.tensors.remove(tensor)
    elif action == 1:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([0, 1, 32, 2**20, 2**40, 2**63])
    elif action == 2:
        tensor.dims = rng.choice([[], [1] * 5, tensor.dims[::-1], tensor.dims[:1], [64, 1]])
    elif action == 3:
        tensor.kind = rng.choice([*range(40), 999, 2**31])
    elif action == 4:
        tensor.offset = rng.choice([0, 1, 32, 2**20, 2**40, 2**63])
    elif action == 5:
        tensor.name = rng.choice(
            [b"", b"\xff", b"blk.60000.attn_q.weight", b"rope_freqs.weight", b"x" * 5000,
             rng.choice(parts.tensors).name, b"blk.0.attn_q.bias", b"rope_factors_long.weight"]
        )  # fmt: skip
    elif action == 6:
        parts.n_tensors = rng.choice([0, len(parts.tensors) + 1, 2**20, 2**63])
    else:
        parts.data = rng.choice(
            [b"", parts.data[: len(parts.data) // 2], b"\xff" * len(parts.data)]
        )
