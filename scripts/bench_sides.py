"""The trees that bench_kernels.py times: this one here, another one in a process of its own.

A process takes the package and its kernels from the other tree, and the benchmark itself from this
one, so both are timed in the same way. One of the two runs at a time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench_groups import Group
from bench_timing import Times, steps_of, timed

from mlx_turbokv.errors import InputError

COMPILED = "MLX_PTX_CACHE_DIR"
ARCHIVED = re.compile(r'^ARCHIVED = "(\w+)"$', re.M)


class Turn(NamedTuple):
    """A variant's turn: times of a chain, and seconds of a call where none waits for another."""

    chain: Times
    apart: float | None


class Here:
    """Times the variants of a group in this process."""

    def __init__(self, wanted: Sequence[Group]) -> None:
        self.wanted = wanted

    def prepare(self, index: int) -> dict[str, int]:
        """Make a group's variants, and compile them; returns the steps of each one's chain."""
        self.made: dict[str, Any] = {}  # frees what the last group held
        self.group = self.wanted[index]
        inputs = self.group.inputs()
        self.made = {name: make(inputs) for name, make in self.group.make.items()}
        self.steps = {name: steps_of(variant) for name, variant in self.made.items()}
        return self.steps

    def turn(self, name: str) -> Turn:
        """Time a variant once."""
        variant, n_steps = self.made[name], self.steps[name]
        chain = timed(variant, n_steps, variant.chained)
        apart = None
        if variant.chained and self.group.job == "decode":
            apart = timed(variant, n_steps, False).done
        return Turn(chain, apart)

    def check(self, name: str) -> tuple[float, float] | None:
        """A variant's error and what is accepted; None where nothing is compared."""
        check = self.made[name].check
        return check() if check else None


class Other:
    """Times the variants of a group with the package of another tree.

    Raises:
        InputError: the folder has no package.
        RuntimeError: its process ended.
    """

    def __init__(self, tree: Path, options: Sequence[str]) -> None:
        tree = tree.resolve()
        if not (tree / "mlx_turbokv" / "__init__.py").is_file():
            raise InputError(f"{tree} has no mlx_turbokv: accepted is the folder of another tree.")
        script = Path(__file__).with_name("bench_against.py")
        self._child = subprocess.Popen(
            [sys.executable, str(script), str(tree), "--serve", *options],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, COMPILED: str(compiled_folder(tree))},
        )  # fmt: skip
        self.about = {**self._ask("about"), "commit": commit_of(tree)}

    def prepare(self, index: int) -> dict[str, int]:
        """As ``Here.prepare``."""
        return self._ask("prepare", index)

    def turn(self, name: str) -> Turn:
        """As ``Here.turn``."""
        chain, apart = self._ask("turn", name)
        return Turn(Times(*chain), apart)

    def check(self, name: str) -> tuple[float, float] | None:
        """As ``Here.check``."""
        return self._ask("check", name)

    def close(self) -> None:
        """End the process."""
        self._child.communicate()

    def _ask(self, what: str, *arguments: Any) -> Any:
        send, receive = self._child.stdin, self._child.stdout
        assert send is not None and receive is not None
        try:
            send.write(json.dumps([what, *arguments]) + "\n")
            send.flush()
            answer = receive.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"The process of the other tree ended with {self._child.wait()}.")
        return json.loads(answer)


def serve(here: Here, about: dict) -> None:
    """The other tree's process: answers each line of stdin with one of stdout."""
    answers = {
        "about": lambda: about, "prepare": here.prepare, "turn": here.turn, "check": here.check,
    }  # fmt: skip
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print(json.dumps(answers[what](*arguments)), flush=True)


def compiled_folder(tree: Path) -> Path:
    """Where MLX keeps the compiled kernels of another tree: it tells kernels apart by name alone.

    ``against`` in MLX_PTX_CACHE_DIR, where that is set.
    """
    if own := os.environ.get(COMPILED):
        return Path(own) / "against"
    texts = b"".join(path.read_bytes() for path in sorted((tree / "metal").rglob("*.*")))
    return Path(tempfile.gettempdir()) / f"bench_against_{zlib.crc32(texts):08x}"


def commit_of(tree: Path) -> str | None:
    """The commit of a checkout, or of a tree that ``git archive`` made."""
    if (tree / ".git").exists():
        command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    try:
        found = ARCHIVED.search((tree / "scripts" / "record.py").read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None
