"""Kernels compiled for AMD GPUs by clang: arrays that stay in memory, registers, spills.

Their register file is like Apple's: the compiler unrolls, inlines and allocates for threads that
have 128 registers of 32 bits, in SIMD groups of 32 lanes. Nothing runs.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from .errors import HostError
from .generated import Launch
from .opencl import KERNEL, TYPES, compiled_source
from .toolchain import HERE, cached, clang, digest

PRELUDE = HERE / "amdgpu.h"
# a SIMD of gfx1030 has 1,024 registers for each of 32 lanes: eight waves leave 128 to a thread
_WAVES = "amdgpu_waves_per_eu(8, 8)"
_TARGET = ["-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1030", "-nogpulib", "-O2", "-S"]
# no private array becomes a vector, or is a reason to unroll: Apple's compiler may do neither
_FRONT = (
    "-x cl -cl-std=clc++2021 -cl-no-stdinc -w -fno-caret-diagnostics -ferror-limit=8 "
    "-ffp-contract=on -fno-discard-value-names -mllvm -disable-promote-alloca-to-vector "
    "-mllvm -amdgpu-unroll-threshold-private=0 "
    "-Xclang -cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space -emit-llvm"
).split()
_BACK = ["-x", "ir", "-Xclang", "-disable-llvm-passes"]
_ALLOCA = re.compile(r'^\s*%"?([^\s"]+)"? = alloca (.*?), align', re.M)
# the name of a function at file level in its mangled one, after its length
_PLAIN = re.compile(r"^_Z(?:\d\d?)([a-z_]+?)(?:[A-Z]\w*)?$")
_FUNCTION = re.compile(r"^define [^@]*@([\w.$]+)\(", re.M)
T = TypeVar("T")


class Registers(NamedTuple):
    """What a kernel takes of a GPU's registers.

    Args:
        registers: of 32 bits a thread, at most 128.
        spilled: registers that the compiler had to keep in memory.
        scratch_bytes: memory of a thread, for spills and for private arrays.
    """

    registers: int
    spilled: int
    scratch_bytes: int


def arrays_in_memory(launch: Launch) -> list[str]:
    """Private arrays and structs of a kernel that stay in memory, by name and type.

    Raises:
        HostError: the text does not compile.
        ToolMissingError: there is no g++ or no clang.
    """
    found = _ALLOCA.findall(_ir(launch).read_text())
    return [f"{name}: {kind}" for name, kind in found]


def functions_out_of_line(launch: Launch) -> list[str]:
    """Functions that the compiler calls instead of inlining them."""
    names = [_PLAIN.sub(r"\1", name) for name in _FUNCTION.findall(_ir(launch).read_text())]
    return [name for name in names if name != KERNEL]


def registers(launch: Launch) -> Registers:
    """Registers of a kernel by clang's back-end.

    Raises:
        HostError, ToolMissingError: as for arrays_in_memory.
    """
    ir = _ir(launch)
    command = [clang(), *_BACK, *_TARGET, str(ir), "-o", "kernel.s"]

    def make(folder: Path) -> None:
        _run(command, folder, launch.name)

    text = (cached(f"amdgpu-{digest(ir, command)}", make) / "kernel.s").read_text()
    numbers = (r"; NumVgprs: (\d+)", r"\.vgpr_spill_count: *(\d+)", r"; ScratchSize: (\d+)")
    return Registers(*(max(int(n) for n in re.findall(pattern, text)) for pattern in numbers))


def clang_version() -> int:
    """The major version of clang."""
    out = subprocess.run([clang(), "-dumpversion"], capture_output=True, text=True).stdout
    return int(out.split(".")[0])


def of_many(check: Callable[[Launch], T], launches: list[Launch], workers: int = 2) -> list[T]:
    """``check`` of each launch, several at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(check, launches))


def _ir(launch: Launch) -> Path:
    """The file with a kernel's optimised LLVM IR."""
    x, y, z = launch.threadgroup
    source = compiled_source(launch.text, launch.name, x * y * z)
    source = source.replace("__attribute__((reqd_", f"__attribute__(({_WAVES}, reqd_")
    command = [clang(), *_FRONT, *_TARGET, "-include", str(PRELUDE), "kernel.cl"]
    key = f"ir-{digest(source, PRELUDE, TYPES, command[1:])}"

    def make(folder: Path) -> None:
        (folder / "kernel.cl").write_text(source)
        _run([*command, "-o", "kernel.ll"], folder, launch.name)

    return cached(key, make) / "kernel.ll"


def _run(command: list[str], folder: Path, name: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise HostError(f"{name} does not compile for AMD GPUs:\n{result.stderr[:4000]}")
