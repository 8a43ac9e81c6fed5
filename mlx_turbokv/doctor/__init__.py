"""``mlx_turbokv doctor``: builds and checks every kernel on the machine it runs on."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from ..evaluate.record import command_line, environment
from ..kernels import tuned
from ..kernels.backend import available_backends, select_backend
from . import isolate, sources
from .checks import JOBS
from .variants import Variant, variant_set

# what MLX asks for before it uses a GPU's neural accelerators (M5)
NEURAL_MACOS = (26, 2)
NEURAL_GENERATION = 17
# the files under metal/ that each job runs
FILES = {
    "pack": ("pack.metal",),
    "decode": ("decode.metal", "merge.metal"),
    "protected": ("decode.metal", "merge.metal"),
    "dequantize": ("dequantize.metal",),
    "segments": ("segments.metal",),
}
PROTECTED_ENTRIES = {"decode.metal": "decode_protected"}
_NAMED_FILE = re.compile(r"metal/((?:compat/)?\w+\.(?:metal|h))")


def examine(
    which: str = "default",
    backend: str | None = None,
    *,
    times: bool = True,
    isolated: bool | None = None,
    metal: Path | None = None,
    chosen: list[Variant] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Check the kernel sources, then every variant; returns the record that report.py formats.

    Args:
        which: the set of variants: quick, default or full.
        backend: as ``select_backend`` takes it.
        times: whether the variants are timed too.
        isolated: run kernels in a child process; by default on a GPU.
        metal: the folder of kernel sources, in place of the package's.
        chosen: variants in place of a set's.

    Raises:
        InputError: no such back-end here.
    """
    implementation = select_backend(backend)
    name = implementation.name
    record: dict = {
        "command": command_line(),
        **environment(),
        "os": operating_system(),
        "device_info": _plain(mx.device_info()),
        "neural_accelerators": neural_accelerators(),
        "backends": list(available_backends()),
        "backend": name,
        "tuning": tuned.summary(name),
        "set": "chosen" if chosen is not None else which,
    }
    progress(f"Kernel sources, then the {name} back-end.")
    n_files, problems = sources.check_sources(metal or sources.folder())
    record["source_files"] = n_files
    found = isolate.results(
        variant_set(which) if chosen is None else chosen,
        name,
        progress,
        times=times,
        isolated=name != "reference" if isolated is None else isolated,
    )
    record["variants"] = found
    failures = [_failure(list(p.kernels), p.message, file=p.file) for p in problems]
    for result in found:
        for job, outcome in result["jobs"].items():
            if message := outcome["message"]:
                kernels = kernels_named(job, message, name)
                failures.append(_failure(kernels, message, variant=result["variant"]))
    record["failures"] = failures
    record["passed"] = not failures
    return record


def _failure(
    kernels: list[str], message: str, file: str | None = None, variant: str | None = None
) -> dict:
    return {"kernels": kernels, "file": file, "variant": variant, "message": message}


def kernels_named(job: str, message: str, backend: str) -> list[str]:
    """The kernels that failed: those that the message names, else all that the job runs."""
    if backend == "reference":
        return [f"reference {job}"]
    if job not in JOBS:
        return [job]
    entries = {**sources.ENTRIES, **(PROTECTED_ENTRIES if job == "protected" else {})}
    own = [entries[file] for file in FILES[job]]
    files = set(_NAMED_FILE.findall(message))
    named = [entries[file] for file in FILES[job] if file in files]
    if not named:
        named = [k for k in own if f"turbokv_{k}_" in message or f"'turbokv_{k}'" in message]
    return named or own


def operating_system() -> str:
    """Name, version and processor type of the system."""
    if mac := platform.mac_ver()[0]:
        return f"macOS {mac} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def neural_accelerators(
    architecture: str | None = None, macos: str | None = None
) -> tuple[bool, str] | None:
    """Whether MLX can use the GPU's neural accelerators, and why; None where it is no Apple GPU.

    Args:
        architecture: such as ``applegpu_g17s``; this machine's if None.
        macos: its version; this machine's if None.
    """
    if architecture is None:
        architecture = str(mx.device_info().get("architecture", ""))
    if macos is None:
        macos = platform.mac_ver()[0]
    match = re.fullmatch(r"applegpu_g(\d+)\w*", architecture)
    if match is None:
        return None
    generation = int(match[1])
    version = tuple(int(part) for part in macos.split(".")[:2] if part.isdigit())
    if generation < NEURAL_GENERATION:
        return False, f"generation {generation}, needs {NEURAL_GENERATION}"
    if version < NEURAL_MACOS:
        return False, f"macOS {macos}, needs {'.'.join(map(str, NEURAL_MACOS))}"
    return True, f"generation {generation}, macOS {macos}"


def _plain(info: dict) -> dict:
    return {key: v if isinstance(v, (int, float, str)) else str(v) for key, v in info.items()}
