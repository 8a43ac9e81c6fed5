"""Whether the kernel sources that came with the package are whole."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from ..kernels import assemble

MANIFEST = "SHA256SUMS"
SUFFIXES = (".metal", ".h")
# the kernels, by the file under metal/ that holds each, and their entry functions
ENTRIES = {
    "pack.metal": "pack",
    "decode.metal": "decode_partial",
    "merge.metal": "decode_merge",
    "dequantize.metal": "dequantize",
}
_STRINGS_AND_COMMENTS = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)
_CLOSES = {")": "(", "]": "[", "}": "{"}


class Problem(NamedTuple):
    """What is wrong with one file, and the kernels that are built from it."""

    file: str
    kernels: tuple[str, ...]
    message: str


def folder() -> Path:
    """Where metal/ is: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "metal", package.parent / "metal"
    return beside if not inside.is_dir() and beside.is_dir() else inside


def kernels_of(file: str) -> tuple[str, ...]:
    """The kernels whose text holds a file of metal/; none for what only the tests compile."""
    names = []
    for own, kernel in ENTRIES.items():
        parts = ("compat/cuda.h", *assemble.SHARED_FILES, *assemble.NEEDS.get(own, ()), own)
        if file in parts:
            names.append(kernel)
    return tuple(names)


def manifest_text(root: Path) -> str:
    """The manifest of a metal/ folder, as ``sha256sum`` writes and checks it."""
    files = sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES)
    lines = (f"{_sha256(p)}  {p.relative_to(root).as_posix()}\n" for p in files)
    return "".join(lines)


def check_sources(root: Path) -> tuple[int, list[Problem]]:
    """Compare a metal/ folder with its manifest, and look at the files themselves.

    A file fails when it is missing, differs from the manifest, or cannot be a whole kernel: not
    ASCII, brackets that do not pair, its entry function gone. One problem is given a file.

    Returns:
        How many files were looked at, and what is wrong.
    """
    try:
        listed = _listed((root / MANIFEST).read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        listed, reason = {}, getattr(error, "strerror", None) or "it cannot be read"
        problems = [Problem(MANIFEST, (), f"no usable manifest of the sources: {reason}")]
    else:
        problems = []
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix in SUFFIXES}
    names = sorted({*listed, *present, *ENTRIES, *assemble.SHARED_FILES})
    for name in names:
        if message := _wrong(root / name, name, listed):
            problems.append(Problem(name, kernels_of(name), message))
    return len(names), problems


def _wrong(path: Path, name: str, listed: dict[str, str]) -> str | None:
    if not path.is_file():
        return "the file is missing"
    broken = _not_whole(path.read_bytes(), ENTRIES.get(name))
    if broken is not None:
        return broken
    if listed and name not in listed:
        return f"the file is not in {MANIFEST}"
    if listed and listed[name] != _sha256(path):
        return f"the file differs from the one that was shipped ({MANIFEST})"
    return None


def _not_whole(content: bytes, entry: str | None) -> str | None:
    """Why the text cannot be a whole source file, as far as reading it tells."""
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not ASCII"
    code = _STRINGS_AND_COMMENTS.sub(lambda m: "\n" * m.group().count("\n"), text)
    if entry is not None and not re.search(rf"\bvoid\s+{entry}\s*\(", code):
        return f"its function {entry} is not there"
    open_brackets: list[tuple[str, int]] = []
    for number, line in enumerate(code.splitlines(), 1):
        for character in line:
            if character in _CLOSES.values():
                open_brackets.append((character, number))
            elif character in _CLOSES:
                if not open_brackets or open_brackets.pop()[0] != _CLOSES[character]:
                    return f"line {number}: '{character}' closes nothing"
    if open_brackets:
        return "line {1}: '{0}' is never closed".format(*open_brackets[-1])
    return None


def _listed(text: str) -> dict[str, str]:
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return {name.lstrip("*"): digest for digest, name in pairs}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
