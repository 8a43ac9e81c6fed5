"""Whether the kernel sources are where the package looks for them, and hold the kernels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ..kernels import assemble

# the kernels, by the file under metal/ that holds each, and their entry functions
ENTRIES = {
    "pack.metal": "pack",
    "decode.metal": "decode_partial",
    "merge.metal": "decode_merge",
    "dequantize.metal": "dequantize",
    "segments.metal": "read_segments",
}


class Problem(NamedTuple):
    """What is wrong with one file, and the kernels that are built from it."""

    file: str
    kernels: tuple[str, ...]
    message: str


def folder() -> Path:
    """Where metal/ is: in the wheel, or next to the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "metal", package.parent / "metal"
    return beside if not inside.is_dir() and beside.is_dir() else inside


def parts_of(file: str) -> tuple[str, ...]:
    """The files under metal/ that the text of a kernel's file is made of."""
    return ("compat/cuda.h", *assemble.SHARED_FILES, *assemble.NEEDS.get(file, ()), file)


def check_sources(root: Path) -> tuple[int, list[Problem]]:
    """Look at every file that the kernels are made of; pip's RECORD has their hashes.

    A file fails when it is missing, is not ASCII, or lacks its entry function.

    Returns:
        How many files were looked at, and what is wrong.
    """
    kernels_of: dict[str, list[str]] = {}
    for own, kernel in ENTRIES.items():
        for part in parts_of(own):
            kernels_of.setdefault(part, []).append(kernel)
    problems = []
    for name, kernels in kernels_of.items():
        if message := _wrong(root / name, ENTRIES.get(name)):
            problems.append(Problem(name, tuple(kernels), message))
    return len(kernels_of), problems


def _wrong(path: Path, entry: str | None) -> str | None:
    """Why the file cannot be a kernel source, as far as reading it tells."""
    if not path.is_file():
        return "the file is missing"
    try:
        text = path.read_bytes().decode("ascii")
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not ASCII"
    if entry is not None and not re.search(rf"\bvoid\s+{entry}\s*\(", text):
        return f"its function {entry} is not there"
    return None
