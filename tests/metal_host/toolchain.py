"""Finds g++, gcov and clang, and compiles with a cache."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import ToolMissingError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
HOST_PRELUDE = REPOSITORY / "metal" / "compat" / "host.h"
GXX_AT_LEAST = 12
CLANG_AT_LEAST = 14


@functools.cache
def tool(name: str, package: str, at_least: int) -> str:
    """Path of a compiler tool.

    Raises:
        ToolMissingError: it is not installed, or older than `at_least`.
    """
    path = shutil.which(name)
    if path is None:
        raise ToolMissingError(f"{name} is not installed; on Debian, `apt-get install {package}`.")
    version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True).stdout.strip()
    if version.split(".")[0].isdigit() and int(version.split(".")[0]) < at_least:
        raise ToolMissingError(f"{name} is version {version}, and {at_least} or newer is needed.")
    return path


def gxx() -> str:
    """Path of g++."""
    return tool("g++", "g++", GXX_AT_LEAST)


def gcov() -> str:
    """Path of gcov, which comes with g++."""
    gxx()
    path = shutil.which("gcov")
    if path is None:
        raise ToolMissingError("gcov is not installed; on Debian, `apt-get install g++`.")
    return path


def clang() -> str:
    """Path of clang."""
    return tool("clang", "clang", CLANG_AT_LEAST)


def mlx_include() -> Path:
    """Include folder of the installed MLX, with its Metal kernels."""
    import mlx.core as mx

    return Path(mx.__file__).resolve().parent / "include"


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels are kept between runs; METAL_HOST_CACHE overrides it."""
    default = Path(tempfile.gettempdir()) / f"metal_host-{os.getuid()}"
    folder = Path(os.environ.get("METAL_HOST_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def machine_flags() -> tuple[str, ...]:
    """Half precision in hardware where the processor has it; results are the same without."""
    if platform.machine() == "x86_64":
        info = Path("/proc/cpuinfo")
        if info.exists() and " f16c " in info.read_text():
            return ("-mf16c",)
    return ()


def digest(*parts: object) -> str:
    """A short hash of texts, paths' contents and flags."""
    h = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()[:24]


def cached(key: str, make: Callable[[Path], None]) -> Path:
    """The cache folder of `key`, made by `make(folder)` unless another call has made it."""
    folder = cache_folder() / key
    done = folder / "done"
    if done.exists():
        return folder
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


def run(command: list[str], what: str, error: type[Exception], **kwargs: object) -> str:
    """Standard output of a command; `error` with its messages if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, **kwargs)
    if result.returncode != 0:
        raise error(f"{what} does not compile:\n{result.stderr[-8000:]}")
    return result.stdout
