"""A kernel's generated Metal text as C++ for OpenCL, which clang compiles for other machines."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from . import text as metal
from .build import preprocess
from .toolchain import HERE, clang

MAX_THREADGROUP_BYTES = 32 * 1024
KERNEL = "compiled_kernel"  # what compiled_source calls it
PRELUDE = HERE / "opencl.h"
TYPES = HERE / "opencl_types.h"  # of this prelude and amdgpu.h
# of all warnings those of what Metal up to 3.2 lacks, which is C++14
FLAGS = (
    "-x cl -cl-std=clc++2021 -cl-no-stdinc -target spir64 -ferror-limit=8 -Wno-everything "
    "-Werror=pre-c++17-compat -Werror=c++20-extensions -Werror=c99-designator "
    "-fno-caret-diagnostics -Xclang -cl-ext=-all,+cl_khr_fp16,"
    "+__opencl_c_generic_address_space"
).split()

# Attributes of Metal's kernels as OpenCL's functions give them.
_THREE = "(uint3)((uint){0}(0), (uint){0}(1), (uint){0}(2))"
_ATTRIBUTES = {
    "threadgroup_position_in_grid": _THREE.format("get_group_id"),
    "thread_position_in_grid": _THREE.format("get_global_id"),
    "thread_position_in_threadgroup": _THREE.format("get_local_id"),
    "threadgroups_per_grid": _THREE.format("get_num_groups"),
    "simdgroup_index_in_threadgroup": "get_sub_group_id()",
    "thread_index_in_simdgroup": "get_sub_group_local_id()",
}


@dataclass(frozen=True)
class _Parts:
    """A kernel's text, cut: OpenCL has no kernel templates and no attributes of parameters."""

    head: str
    definitions: str
    signature: str
    body: str
    threadgroup_bytes: str


def checked_source(text: str, name: str) -> str:
    """The text for a check of types, which also refuses too much threadgroup memory.

    Raises:
        ValueError: the text holds no kernel, or one that cannot be understood.
    """
    parts = _parts(text, name)
    limit = (
        f"static_assert({parts.threadgroup_bytes} <= {MAX_THREADGROUP_BYTES}, "
        '"threadgroup memory above 32 KiB");'
    )
    signature = _without_attributes(parts.signature)
    kernel = f"__kernel void {name}{signature} {{{parts.body}{limit}}}"
    return f"{parts.head}namespace checked {{ {parts.definitions}\n{kernel}\n}}\n"


def compiled_source(text: str, name: str, threads: int) -> str:
    """The text as an OpenCL kernel, KERNEL, of ``threads`` threads, to be compiled.

    Raises:
        ValueError: as in checked_source.
    """
    parts = _parts(text, name)
    found = metal.find_kernel(f"[[kernel]] void {name}{parts.signature}", name).parameters
    buffers = ", ".join(p.declaration for p in found if p.buffer is not None)
    others = [p for p in found if p.buffer is None]
    unknown = [p.attribute for p in others if p.attribute not in _ATTRIBUTES]
    if unknown:
        raise ValueError(f"the attribute [[{unknown[0]}]] has no counterpart in OpenCL")
    values = " ".join(f"{p.declaration} = {_ATTRIBUTES[str(p.attribute)]};" for p in others)
    size = f"__attribute__((reqd_work_group_size({threads}, 1, 1)))"
    return (
        f"{parts.head}namespace checked {{ {parts.definitions}\n"
        f"{size} __kernel void {KERNEL}({buffers}) {{\n{values}\n{parts.body}}}\n}}\n"
    )


def constants(text: str, name: str, expressions: Sequence[str]) -> list[int]:
    """Values of integral constant expressions at the end of a kernel's body, by clang.

    Raises:
        ValueError: an expression is no constant of this text.
    """
    parts = _parts(text, name)
    last = f'static_assert(Values<{", ".join(expressions)}>::none, "");'
    source = (
        f"{parts.head}namespace checked {{ {parts.definitions}\n"
        "template <int... N> struct Values;\n"
        f"__kernel void f{_without_attributes(parts.signature)} {{{parts.body}\n{last}}}\n}}\n"
    )
    command = [clang(), *FLAGS, "-fsyntax-only", "-include", str(PRELUDE), "-"]
    messages = subprocess.run(command, input=source, capture_output=True, text=True).stderr
    shown = re.search(r"undefined template '.*Values<([-\d, ]+)>'$", messages, re.M)
    if shown is None:
        raise ValueError(f"{', '.join(expressions)}: {messages[:2000]}")
    return [int(n) for n in shown.group(1).split(",")]


def _parts(text: str, name: str) -> _Parts:
    body, instantiated = metal.instance(text)
    body = preprocess(f'#line 1 "kernel"\n{body}')
    body = re.sub(r"^#pragma METAL.*$", "", body, flags=re.M)
    body, variables = metal.rewrite_threadgroup(body, _declare)
    start = re.search(
        r"((?:template\s*<([^{}]*?)>\s*)?)\[\[kernel\]\]\s+void\s+" + name + r"\s*\(", body
    )
    if start is None:
        raise ValueError("no [[kernel]] in the text")
    toks = metal.tokens(body[start.end() - 1 :])
    close = metal.closing(toks, 0, "(", ")")
    rest = "".join(toks[close + 1 :])
    return _Parts(
        head=_without_attributes(body[: start.start()]),
        definitions=_parameters(start.group(2) or "", instantiated),
        signature="".join(toks[: close + 1]),
        body=rest[rest.index("{") + 1 : rest.rindex("}")],
        threadgroup_bytes=" + ".join(f"sizeof({v.name})" for v in variables) or "0",
    )


def _without_attributes(text: str) -> str:
    return re.sub(r"\[\[[^\]]*\]\]", "", text)


def _declare(variable: metal.Variable, number: int) -> str:
    return f"__local {variable.type} {variable.name}{variable.dimensions};"


def _parameters(template: str, instantiated: str | None) -> str:
    """Definitions of template parameters: `typename T, int N` with `f<half, 3>`."""
    if not template:
        return ""
    inner = re.search(r"<(.*)>$", (instantiated or "").strip(), re.S)
    values = metal.split_top(inner.group(1)) if inner else []
    names = metal.split_top(template)
    if len(values) != len(names):
        raise ValueError(f"{len(names)} template parameters and {len(values)} values")
    out = []
    for declaration, value in zip(names, values):
        kind, name = declaration.rsplit(None, 1)
        if kind in ("typename", "class"):
            out.append(f"typedef {value} {name};")
        else:
            out.append(f"__constant constexpr {kind} {name} = {value};")
    return " ".join(out)
