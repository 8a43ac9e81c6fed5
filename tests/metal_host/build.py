"""Turns a launch into compiled host code, in two builds."""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import text as metal
from .errors import HostError
from .toolchain import (
    HERE,
    HOST_PRELUDE,
    REPOSITORY,
    cached,
    digest,
    gxx,
    machine_flags,
    mlx_include,
    run,
)

BUILDS = ("asan", "records")

# -O0: the compiler's counters are of the text, not of what an optimiser left of it, and compiling
# takes longer than running.
_COMMON = (
    "-std=c++17 -fPIC -O0 -g1 -gdwarf-4 -ffp-contract=off -fno-exceptions -fno-rtti "
    "-fno-strict-aliasing -fno-omit-frame-pointer -ftrivial-auto-var-init=pattern -w"
).split()
_FLAGS = {
    "asan": [
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize=vptr",
        "-fno-sanitize-recover=all",
        "--coverage",
    ],
    "records": ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"],
}
_LINK_FLAGS = {"asan": ["-fsanitize=address,undefined", "--coverage"], "records": []}
_RUNTIME_FLAGS = {"asan": ["-DHOST_ASAN"], "records": ["-DHOST_RECORDS"]}

_ATTRIBUTES = {
    "thread_position_in_grid": "grid",
    "threadgroup_position_in_grid": "group",
    "threadgroups_per_grid": "groups",
    "thread_position_in_threadgroup": "local",
    "threads_per_threadgroup": "group_size",
    "dispatch_threads_per_threadgroup": "group_size",
    "threads_per_grid": "grid_size",
    "thread_index_in_threadgroup": "linear",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simd",
    "simdgroups_per_threadgroup": "n_simd",
    "dispatch_simdgroups_per_threadgroup": "n_simd",
}
_SIMD_WIDTH = ("threads_per_simdgroup", "thread_execution_width")


@dataclass(frozen=True)
class Compiled:
    """A kernel ready to run: its signature, and its library in each build."""

    kernel: metal.Kernel
    libraries: dict[str, Path]


def runtime(build: str) -> Path:
    """The program that runs kernels of a build."""
    sources = [HERE / n for n in ("runtime.cpp", "scheduler.h", "records.h", "fiber.h")]
    key = digest(build, *sources, *_RUNTIME_FLAGS[build])

    def make(folder: Path) -> None:
        objects = folder / "runtime.o"
        compile_flags = ["-std=c++17", "-O2", "-g1", *_RUNTIME_FLAGS[build]]
        run(
            [gxx(), *compile_flags, "-c", str(HERE / "runtime.cpp"), "-o", str(objects)],
            "the host run time",
            HostError,
        )
        link = ["-fsanitize=address,undefined"] if build == "asan" else []
        run(
            [gxx(), *link, "-rdynamic", str(objects), "-o", str(folder / "runtime"), "-ldl"],
            "the host run time",
            HostError,
        )

    return cached(f"runtime-{key}", make) / "runtime"


def preprocess(text: str, definitions: tuple[str, ...] = ()) -> str:
    """The preprocessed text, with Metal's predefined macros and without the host's."""
    command = [
        gxx(), "-E", "-x", "c++", "-std=c++17", "-nostdinc", "-nostdinc++",
        "-D__METAL__", "-D__METAL_VERSION__=310", *definitions,
        f"-I{mlx_include()}", f"-I{REPOSITORY}", "-",
    ]  # fmt: skip
    return run(command, "the kernel text", HostError, input=metal.drop_includes(text))


def _declare(variable: metal.Variable, number: int) -> str:
    kind = f"host_tg{number}_{variable.name}"
    return (
        f"typedef {variable.type} {kind} {variable.dimensions}; "
        f"static char {kind}_key; struct {kind}_in {{ {kind} v; }}; "
        f"{kind}& {variable.name} = host_threadgroup_variable<{kind}_in>"
        f'(&{kind}_key, "{variable.name}").v;'
    )


def _argument(index: int, parameter: metal.Parameter, slots: dict[int, int]) -> str:
    if parameter.buffer is not None:
        return f"HostArgument<P::at<{index}>>::from(b[{slots[parameter.buffer]}])"
    if parameter.attribute in _SIMD_WIDTH:
        return "32"
    member = _ATTRIBUTES.get(parameter.attribute or "")
    if member is None:
        raise HostError(f"the host layer does not know the attribute [[{parameter.attribute}]]")
    pointer = "&" if member in ("linear", "lane", "simd", "n_simd") else ""
    return f"HostAttribute<P::at<{index}>>::from({pointer}host_current->{member})"


def host_source(text: str, name: str, call: str | None = None) -> tuple[str, metal.Kernel]:
    """Host C++ of a kernel (prelude aside), with an entry that takes an array of buffers."""
    body, instantiated = metal.instance(text)
    body = preprocess(f'#line 1 "kernel"\n{body}')
    body = re.sub(r"^#pragma METAL.*$", "", body, flags=re.M)
    kernel = metal.find_kernel(body, name, call or instantiated)
    body, _ = metal.rewrite_threadgroup(body, _declare)
    body = re.sub(r"\bthreadgroup\b", "", metal.rewrite_constant(body))
    buffers = [p.buffer for p in kernel.parameters if p.buffer is not None]
    slots = {b: i for i, b in enumerate(buffers)}
    arguments = ", ".join(_argument(i, p, slots) for i, p in enumerate(kernel.parameters))
    entry = (
        '\n# 1 "entry"\nextern "C" void host_entry(void** b) {\n'
        f"  constexpr auto f = &{kernel.call};\n"
        "  typedef HostParameters<decltype(+f)> P;\n"
        f"  f({arguments});\n}}\n"
    )
    return body + entry, kernel


@functools.cache
def compile_kernel(text: str, name: str, call: str | None = None) -> Compiled:
    """Compiles a kernel for every build, or finds it in the cache.

    Raises:
        HostError: the text is not understood by the host layer or by g++.
        ToolMissingError: there is no g++.
    """
    source, kernel = host_source(text, name, call)
    prelude = prelude_digest()
    folders = {b: f"kernel-{digest(b, source, prelude, _COMMON, _FLAGS[b])}" for b in BUILDS}
    running = {}

    def start(build: str, folder: Path) -> None:
        (folder / "kernel.cpp").write_text(source)
        command = [
            gxx(), *_COMMON, *machine_flags(), *_FLAGS[build], "-include", str(HOST_PRELUDE),
            "-c", "kernel.cpp", "-o", "kernel.o",
        ]  # fmt: skip
        running[build] = subprocess.Popen(
            command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def finish(build: str, folder: Path) -> None:
        _, errors = running[build].communicate()
        if running[build].returncode != 0:
            raise HostError(f"{name} does not compile as host C++:\n{errors[:8000]}")
        run(
            [gxx(), "-shared", *_LINK_FLAGS[build], "kernel.o", "-o", "kernel.so"],
            name,
            HostError,
            cwd=folder,
        )

    # The builds are nested so that both compilers run at once under both locks.
    def make_second(folder: Path) -> None:
        start("records", folder)
        finish("records", folder)

    def make_first(folder: Path) -> None:
        start("asan", folder)
        try:
            cached(folders["records"], make_second)
        finally:
            finish("asan", folder)

    first = cached(folders["asan"], make_first)
    second = cached(folders["records"], make_second)
    libraries = {"asan": first / "kernel.so", "records": second / "kernel.so"}
    return Compiled(kernel, libraries)


def prelude_digest() -> str:
    """Hash of everything that the prelude includes."""
    return digest(*sorted(HOST_PRELUDE.parent.glob("host*.h")))
