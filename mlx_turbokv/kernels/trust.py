"""Which kernels may run on this machine: each is checked before its first launch, and remembered.

Another compiler, driver or chip may make something else of a kernel's text. So a kernel, which is a
text with its template values, is compared with the reference on a small input (selfcheck.py) before
it is first launched on a machine; a file in the cache folder remembers which agreed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import plistlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..errors import InputError, short
from ..files import cache_dir, parse_json, read_bytes, write_text
from ..quant.layout import KVLayout
from . import assemble

VARIABLE = "TURBOKV_SELFCHECK"
FILE_NAME = "kernels.json"
MOST_MACHINES = 16  # and texts, whose kernels the file remembers
# the files under metal/ that hold an operation's kernels
FILES = {
    "pack": ("pack.metal",),
    "decode": ("decode.metal", "merge.metal"),
    "dequantize": ("dequantize.metal",),
    "segments": ("segments.metal",),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel: an operation's text with its template values.

    Args:
        op: pack, decode, dequantize or segments.
        dtype: of the rows that it takes or makes, or of the queries.
        rows: query rows that a threadgroup of decode takes.
        whole: whether decode is one launch; if not, merge follows.
        cut: the tuning of decode.
        heads: GQA factor and queries that decode is checked with.
        protected: whether decode, or segments, reads the tail as protected rows; None: it reads
            none such.
        rotated: whether pack takes turbo rows in the rotated basis.
        fresh: type of the rows that segments takes as they are.
    """

    op: str
    backend: str
    layout: KVLayout
    dtype: mx.Dtype
    centred: bool = False
    rows: int = 0
    whole: bool = False
    cut: Any = None
    heads: tuple[int, int] = (1, 1)
    protected: bool | None = None
    rotated: bool = False
    fresh: mx.Dtype | None = None

    def __str__(self) -> str:
        layout, dims = self.layout, f"{self.layout.k_head_dim}"
        if layout.v_head_dim != layout.k_head_dim:
            dims += f" and {layout.v_head_dim}"
        parts = [f"K {layout.k_format} with V {layout.v_format}", f"head_dim {dims}"]
        parts += [str(self.dtype).removeprefix("mlx.core.")]
        parts += ["centred keys"] * self.centred
        parts += ["rotated rows"] * self.rotated
        if self.fresh is not None:
            parts += [f"new rows in {str(self.fresh).removeprefix('mlx.core.')}"]
        if self.protected is not None:
            parts += [f"protected {'first and newest' if self.protected else 'first'} tokens"]
        if self.op == "decode":
            parts += [f"{self.rows} rows at once", "in one launch" if self.whole else "in splits"]
        return f"{self.op} of {', '.join(parts)}"

    @property
    def name(self) -> str:
        """What the file calls it: all that its generated text depends on."""
        return f"{self}, {self.layout.dtype} rows" + (f", {self.cut}" if self.cut else "")


class UntrustedKernelError(Exception):
    """A kernel that does not do what the reference does on this machine; the message says how."""


# says what is wrong with a kernel: backend.py puts selfcheck.problem here, whose own launches come
# back to this module
checker: Callable[[Kernel], str | None] | None = None
_lock = threading.RLock()
_found: dict[tuple, str | None] = {}  # what is wrong with a kernel; None: it agrees
_local = threading.local()


def unchecked() -> AbstractContextManager[None]:
    """Kernels are launched without a check meanwhile, as those who compare them themselves want."""
    return _switched(False)


def checked() -> AbstractContextManager[None]:
    """Kernels are checked meanwhile, whatever TURBOKV_SELFCHECK is."""
    return _switched(True)


@contextmanager
def _switched(on: bool) -> Iterator[None]:
    before = getattr(_local, "on", None)
    _local.on = on
    try:
        yield
    finally:
        _local.on = before


def is_on() -> bool:
    """Whether kernels are checked: on a GPU, unless TURBOKV_SELFCHECK is 0.

    Where something else runs them, if it is 1.

    Raises:
        InputError: it is neither.
    """
    if (on := getattr(_local, "on", None)) is not None:
        return on
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise InputError(f"{VARIABLE} is {short(value)}: accepted are 0 and 1.")
    return value == "1" or (value == "" and assemble.factory is None)


def require(kernel: Kernel) -> None:
    """Check a kernel, unless it was checked on this machine before.

    Called where a launch is prepared, which comes before it is traced and once for all its calls.

    Raises:
        UntrustedKernelError: it differs from the reference, or does not compile or run.
    """
    if not is_on():
        return
    with _lock:
        key = assemble.factory, digest(kernel.op, kernel.backend), kernel.name
        if key not in _found:
            _found[key] = _check(kernel)
        message = _found[key]
    if message is not None:
        raise UntrustedKernelError(message)


def refused() -> list[str]:
    """What is wrong with each kernel that failed its check in this process."""
    return [message for message in _found.values() if message is not None]


def _check(kernel: Kernel) -> str | None:
    machine, path = machine_name(kernel.op, kernel.backend), cache_dir() / FILE_NAME
    if checker is None or kernel.name in remembered(path).get(machine, ()):
        return None
    with unchecked():
        problem = checker(kernel)
    if problem is not None:
        return f"The {kernel.backend} kernel {kernel} {problem}"
    _remember(path, machine, kernel.name)
    return None


def remembered(path: Path) -> dict[str, list[str]]:
    """Names of the kernels that agreed, by machine; nothing where the file is damaged."""
    try:
        found = parse_json(read_bytes(path))
        machines = found["agreed"]
        whole = all(isinstance(n, str) for names in machines.values() for n in names)
        return {str(m): list(names) for m, names in machines.items()} if whole else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _remember(path: Path, machine: str, name: str) -> None:
    """Add a kernel; where the folder cannot be written, it is checked again in the next process."""
    machines = remembered(path)
    names = [*machines.pop(machine, []), name]  # the newest machine is the last
    kept = [*machines.items()][-(MOST_MACHINES - 1) :]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"agreed": {**dict(kept), machine: names}}, indent=1) + "\n")
    except OSError:
        pass


def machine_name(op: str, backend: str) -> str:
    """What a result holds for: chip, system build, MLX, package, and the text of the operation."""
    return f"{_machine()}, {backend}, {op} {digest(op, backend)}"


@cache
def _machine() -> str:
    info = mx.device_info()
    chip = " ".join(str(info[k]) for k in ("device_name", "architecture") if info.get(k))
    return f"{chip}, {system_build()}, mlx {version('mlx')}, mlx_turbokv {__version__}"


def system_build() -> str:
    """The build of the operating system, and the version of NVIDIA's driver where there is one."""
    try:
        with open("/System/Library/CoreServices/SystemVersion.plist", "rb") as file:
            return f"macOS {plistlib.load(file)['ProductBuildVersion']}"
    except (OSError, ValueError, KeyError, plistlib.InvalidFileException):
        pass
    build = f"{platform.system()} {platform.release()}"
    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, ValueError, IndexError):
        return build
    return f"{build}, {' '.join(driver.split())}"


def digest(op: str, backend: str) -> str:
    """Of the text of an operation's kernels, and of what launches them."""
    return _digest(*(assemble.header_text(file, backend) for file in FILES[op]))


@lru_cache(maxsize=32)
def _digest(*texts: str) -> str:
    found = hashlib.sha256("".join(texts).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
