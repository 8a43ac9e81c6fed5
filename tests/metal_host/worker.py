"""Starts and talks to the processes of runtime.cpp, one for each build."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .build import runtime
from .errors import HostError

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
_SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:redzone=256:max_redzone=2048"
    ":handle_abort=1:allocator_may_return_null=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


@dataclass
class Buffer:
    """A device buffer: the bytes of an input, or the size of an output to fill with NaN."""

    name: str
    data: np.ndarray
    kind: int  # 0 input, 1 output, 2 output with initial values
    # bytes from the first to the second half of the data, under AddressSanitizer; 0: no gap
    second: int = 0


class Worker:
    """A process that runs kernels of one build."""

    def __init__(self, build: str, coverage: Path | None = None) -> None:
        self.build = build
        self.coverage = coverage
        self.process: subprocess.Popen | None = None
        self.errors = None

    def _start(self) -> subprocess.Popen:
        if self.process is None or self.process.poll() is not None:
            environment = {**os.environ, **_SANITIZER_OPTIONS}
            if self.coverage is not None:
                environment["GCOV_PREFIX"] = str(self.coverage)
            self.errors = tempfile.TemporaryFile()
            self.process = subprocess.Popen(
                [str(runtime(self.build))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env=environment,
            )
        return self.process

    def send(
        self, library: Path, grid: tuple, group: tuple, buffers: list[Buffer], order: str, seed: int
    ) -> None:
        """Starts a run; `receive` gives its outcome."""
        process = self._start()
        parts = [_text(str(library)), struct.pack("<6I", *grid, *group)]
        parts.append(struct.pack("<IQI", ORDERS[order], seed, len(buffers)))
        for b in buffers:
            parts.append(_text(b.name) + struct.pack("<IQQ", b.kind, b.data.nbytes, b.second))
        parts += [b.data.tobytes() for b in buffers if b.kind != 1]
        try:
            process.stdin.write(b"".join(parts))
            process.stdin.flush()
        except BrokenPipeError:
            pass  # receive() reports what happened

    def receive(self, library: Path, buffers: list[Buffer]) -> list[np.ndarray]:
        """The outputs of the run that `send` started.

        Raises:
            HostError: the run met a defect.
        """
        (length,) = struct.unpack("<I", self._read(4))
        failure = self._read(length).decode()
        (base,) = struct.unpack("<Q", self._read(8))
        if failure:
            raise HostError(_with_lines(failure, library, base))
        outputs = []
        for b in buffers:
            if b.kind != 0:
                raw = np.frombuffer(self._read(b.data.nbytes), dtype=np.uint8)
                outputs.append(raw.view(b.data.dtype).reshape(b.data.shape))
        return outputs

    def _read(self, n: int) -> bytes:
        data = self.process.stdout.read(n)
        if len(data) == n:
            return data
        code = self.process.wait()
        self.errors.seek(0)
        report = self.errors.read().decode(errors="replace").split("Shadow bytes")[0]
        self.process = None
        raise HostError(f"the kernel was stopped (exit status {code}):\n{report[:6000]}")

    def close(self) -> None:
        """Ends the process, which writes its coverage counters then."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<I", len(data)) + data


def _with_lines(report: str, library: Path, base: int) -> str:
    """Replaces {pc ...} by file and line."""

    def line(match: re.Match) -> str:
        offset = int(match.group(1), 16) - base
        found = subprocess.run(
            ["addr2line", "-e", str(library), hex(offset)], capture_output=True, text=True
        ).stdout.strip()
        name = re.search(r"(metal/)?[^/]+$", found)
        return name.group(0) if name else hex(offset)

    return re.sub(r"\{pc ([0-9a-f]+)\}", line, report)
