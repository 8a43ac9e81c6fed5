"""What Mesa's compiler for Apple GPUs (AGX: M1, M2) makes of a kernel's text, without one.

It runs in a chroot that the tools' setup.sh makes; see apple_kernels.py.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from mlx_turbokv.errors import InputError

FILES = ("agx.h", "agx_stats.c", "to_spirv.sh")
BUILT = "agx_stats"
STOPPED = (-9, -15, 137, 143)  # by others: no result of the text
_STATISTICS = re.compile(
    r"(?P<instructions>\d+) inst, .* (?P<scratch_bytes>\d+) scratch, "
    r"(?P<threads_a_core>\d+) threads, \d+ loops, (?P<spills>\d+):(?P<fills>\d+)"
)
_BLOCK = re.compile(r"^block(\d+) \{\n(.*?)^\} ?([^\n]*)$", re.M | re.S)
# jmp_exec_any, which closes a loop: its opcode, and a signed offset in bytes from its start
_JUMP, _JUMP_BYTES = b"\x00\xc0", 6
ARRAY_IN_MEMORY = "a private array stays in memory"


class Compiler:
    """The compiler in its chroot, and what it has found so far.

    Args:
        tools: the folder with setup.sh and the files of FILES.
        home: where setup.sh has put the chroot.

    Raises:
        InputError: something is missing, or the chroot was made of other files.
    """

    def __init__(self, tools: Path, home: Path) -> None:
        self.folder, self.cache = home / "root/agx", home / "cache"
        missing = [name for name in (*FILES, "setup.sh") if not (tools / name).is_file()]
        if missing:
            raise InputError(f"{tools} holds no {missing[0]}: give the folder with the AGX tools.")
        if not (self.folder / BUILT).is_file():
            raise InputError(f"{self.folder / BUILT} is missing: run {tools / 'setup.sh'} first.")
        digest = sha256((self.folder / BUILT).read_bytes())
        for name in FILES:
            data = (self.folder / name).read_bytes()
            if data != (tools / name).read_bytes():
                raise InputError(
                    f"{self.folder / name} is not {tools / name}: make the chroot anew."
                )
            digest.update(data)
        self.version = (self.folder / "mesa/VERSION").read_text().strip()
        self._digest = digest.hexdigest()
        self._root = home / "root"
        for folder in (self.cache, self.folder / "k"):
            folder.mkdir(exist_ok=True)

    def statistics(self, source: str) -> dict:
        """Statistics of an OpenCL text with one kernel, from the cache where it is known.

        ``error`` instead of figures says why the compiler gave up. ``loops``: for each, innermost
        ones included, instructions, bytes and the place of its first byte.
        """
        key = sha256((self._digest + source).encode()).hexdigest()[:32]
        known = self.cache / f"{key}.json"
        if not known.exists():
            found = json.dumps(self._compile(source, key))
            scratch = known.with_suffix(f".{uuid4().hex}")
            scratch.write_text(found)
            scratch.replace(known)
        return json.loads(known.read_text())

    def _compile(self, source: str, key: str) -> dict:
        folder = self.folder / "k"
        key = f"{key}-{uuid4().hex}"  # others may compile the same text
        (folder / f"{key}.cl").write_text(source)
        try:
            translated = self._run("bash", "/agx/to_spirv.sh", key)
            if ARRAY_IN_MEMORY in translated.stderr:
                return {"error": ARRAY_IN_MEMORY}
            if translated.returncode:
                return {"error": _last_line(translated.stderr)}
            command = "env", "AGX_MESA_DEBUG=shaders,internal", f"/agx/{BUILT}", f"/agx/k/{key}.spv"
            compiled = self._run(*command)
            if '{"file"' not in compiled.stdout:
                return {"error": _last_line(compiled.stderr) or f"status {compiled.returncode}"}
            binary = (folder / f"{key}.spv.agx").read_bytes()
            return parsed(compiled.stdout, compiled.stderr, binary)
        finally:
            for path in folder.glob(f"{key}.*"):
                path.unlink()

    def _run(self, *command: str) -> subprocess.CompletedProcess:
        done = subprocess.run(["chroot", self._root, *command], capture_output=True, text=True)
        if done.returncode in STOPPED:
            raise RuntimeError(f"{command[0]} was stopped: status {done.returncode}")
        return done


def parsed(listing: str, messages: str, binary: bytes) -> dict:
    """Statistics from what agx_stats prints, its messages and the machine code."""
    about = json.loads(re.search(r'^\{"file".*$', listing, re.M).group())  # type: ignore[union-attr]
    statistics = _STATISTICS.search(about["stats"])
    demand = re.search(r"AGX-DEMAND (\d+)", messages)
    assert statistics and demand, listing[-2000:]
    return {
        **{name: int(value) for name, value in statistics.groupdict().items()},
        "demand": int(demand.group(1)),
        "registers": about["half_registers"],
        "threads_a_core": about["threads"],
        "threadgroup_bytes": about["local"],
        "code_bytes": about["main_bytes"],
        "loops": _loops(listing, binary),
    }


def _loops(listing: str, binary: bytes) -> list[dict]:
    """The loops by their first byte; an outer one comes before those in it.

    The listing has the instructions of each block and the blocks that may follow it; the machine
    code has the jumps back. Loops are in both in the order of their ends.
    """
    blocks = _main_blocks(listing)
    ends: dict[int, int] = {}
    for number, (_, following) in blocks.items():
        for start in following:
            if start <= number:
                ends[start] = max(ends.get(start, 0), number)
    found = []
    jumps = list(_jumps_back(binary))
    by_end = sorted(ends.items(), key=lambda loop: loop[1])
    if len(jumps) != len(by_end):
        raise ValueError(f"{len(by_end)} loops in the listing, {len(jumps)} in the machine code")
    for (start, end), (first, last) in zip(by_end, jumps):
        count = sum(n for number, (n, _) in blocks.items() if start <= number <= end)
        found.append({"instructions": count, "bytes": last - first, "at": first})
    return sorted(found, key=lambda loop: loop["at"])


def _main_blocks(listing: str) -> dict[int, tuple[int, list[int]]]:
    """Instructions of each block of the kernel's last listing, and the blocks that may follow.

    The listing has the kernel before and after its registers are allocated, then the preamble.
    """
    shaders: list[dict] = []
    for number, body, rest in _BLOCK.findall(listing):
        if number == "0":
            shaders.append({})
        following = [int(n) for n in re.findall(r"block(\d+)", rest.split("from")[0])]
        lines = [line for line in body.splitlines() if line.startswith("   ")]
        shaders[-1][int(number)] = len(lines), following, "uniform_store" in body
    kernels = [s for s in shaders if not any(preamble for *_, preamble in s.values())]
    return {number: (n, following) for number, (n, following, _) in kernels[-1].items()}


def _jumps_back(binary: bytes) -> Iterator[tuple[int, int]]:
    """First byte, and the byte after the last, of each loop, by its end."""
    for at in range(0, len(binary) - _JUMP_BYTES + 1, 2):
        if binary[at : at + 2] == _JUMP:
            (offset,) = struct.unpack_from("<i", binary, at + 2)
            if -at <= offset < 0:
                yield at + offset, at + _JUMP_BYTES


def _last_line(messages: str) -> str:
    return next((line.strip() for line in reversed(messages.splitlines()) if line.strip()), "")
