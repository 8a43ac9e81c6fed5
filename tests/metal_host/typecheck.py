"""Checks the exact Metal text of a launch: types by clang, and the limits of every Apple GPU.

`python -m metal_host.typecheck FILE...` (with tests/ on the path) checks files that hold a
generated text each.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import text as metal
from .generated import Launch
from .opencl import FLAGS, PRELUDE, TYPES, checked_source
from .toolchain import cached, clang, digest

MAX_THREADS = 512  # register pressure caps pipelines below 1024 on some chips
MAX_BUFFERS = 31
# Formats, head dims, GQA factors and switches; a larger value can only be a length.
MAX_TEMPLATE_VALUE = 512

_SPACES = re.compile(r"\b(device|constant|threadgroup|thread)\b")
_FORBIDDEN = {
    r"\bdouble\b": "double, which Metal lacks",
    r"\bstd::": "the namespace std, which Metal lacks",
    r"\bgoto\b": "goto, which Metal lacks",
    r"\bnew\b": "new, which Metal lacks",
    r"\bvirtual\b": "virtual functions, which Metal lacks",
    r"\b(try|throw|catch)\b": "exceptions, which Metal lacks",
    r"(?<![\w\])])\[\s*[&=]?\s*\]\s*\(": "a lambda, which Metal lacks",
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a kernel's text or launch."""

    kernel: str
    message: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.message}"


def check_launch(launch: Launch) -> list[Problem]:
    """Everything wrong with a launch: limits, then types.

    Raises:
        ToolMissingError: there is no g++ or no clang.
    """
    problems = check_limits(launch)
    if any("ASCII" in p.message for p in problems):
        return problems
    return problems + check_types(launch.text, launch.name)


def check_launches(launches: list[Launch], workers: int = 2) -> list[Problem]:
    """Problems of many launches; each distinct text is compiled once."""
    distinct = {(x.text, x.threadgroup): x for x in launches}
    with ThreadPoolExecutor(workers) as pool:
        return [p for found in pool.map(check_launch, distinct.values()) for p in found]


def check_limits(launch: Launch) -> list[Problem]:
    """Checks that need no compiler."""
    found = []
    name = launch.name
    if not launch.text.isascii():
        bad = next(c for c in launch.text if not c.isascii())
        return [Problem(name, f"the text is not ASCII: it holds {bad!r}")]
    threads = launch.threadgroup[0] * launch.threadgroup[1] * launch.threadgroup[2]
    if threads > MAX_THREADS:
        found.append(Problem(name, f"{threads} threads in a threadgroup, at most {MAX_THREADS}"))
    kernel = metal.find_kernel(launch.text, name)
    buffers = [p for p in kernel.parameters if p.buffer is not None]
    if len(buffers) > MAX_BUFFERS:
        found.append(Problem(name, f"{len(buffers)} buffers, at most {MAX_BUFFERS}"))
    for p in buffers:
        if p.name not in launch.inputs and p.name not in launch.outputs:
            found.append(Problem(name, f"the source mentions '{p.name}': MLX adds it as a buffer"))
    for key, value in launch.template:
        if isinstance(value, int) and not isinstance(value, bool) and value > MAX_TEMPLATE_VALUE:
            found.append(
                Problem(
                    name,
                    f"template value {key} = {value} is a length: every new "
                    "one compiles another kernel; pass lengths as inputs",
                )
            )
    found += [
        Problem(name, f"the text uses {why}")
        for pattern, why in _FORBIDDEN.items()
        if re.search(pattern, _without_comments(launch.text))
    ]
    return found


def check_same_text(launches: list[Launch]) -> list[Problem]:
    """A problem if launches that differ in lengths only have different template values."""
    templates = {x.template for x in launches}
    if len(templates) > 1:
        return [Problem(launches[0].name, "its template values depend on a length: "
                        + "; ".join(sorted(str(t) for t in templates)))]  # fmt: skip
    return []


def check_types(text: str, name: str) -> list[Problem]:
    """clang's errors in a text, and pointers without an address space, which it accepts."""
    try:
        source = checked_source(text, name)
    except ValueError as error:
        return [Problem(name, str(error))]
    command = [clang(), *FLAGS, "-fsyntax-only", "-include", str(PRELUDE), "kernel.cl"]
    key = f"types-{digest(source, PRELUDE, TYPES, command[1:])}"

    def make(folder: Path) -> None:
        (folder / "kernel.cl").write_text(source)
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        (folder / "messages").write_text(result.stderr if result.returncode else "")

    messages = (cached(key, make) / "messages").read_text()
    errors = [x for x in messages.splitlines() if " error: " in x or ": fatal" in x]
    found = [Problem(name, re.sub(r"^\S*?((?:metal/)?[^/\s]+:\d+)", r"\1", e)) for e in errors]
    if messages and not found:
        found.append(Problem(name, messages[:2000]))
    return found + unqualified_pointers(text, name)


def unqualified_pointers(text: str, name: str) -> list[Problem]:
    """Pointers and references to no named address space.

    clang takes them for generic pointers, which Metal lacks. Checked are function parameters,
    declarations that begin a statement, casts and template arguments.
    """
    toks = [t for t in metal.tokens(_without_comments(text)) if not t.isspace() and t[0] != "#"]
    found = [f"parameter '{part}' of {function}" for function, part in _parameters_of(toks)
             if re.search(r"[*&]", part) and not _SPACES.search(part)]  # fmt: skip
    for i, t in enumerate(toks):
        if t in "*&" and toks[i - 1] not in "*&":
            first = _type_start(toks, i)
            if first is not None and not _SPACES.search(" ".join(toks[first:i])):
                end = i
                while toks[end] in ("*", "&", "const"):
                    end += 1
                before, after = toks[first - 1], toks[end]
                loop = before == "(" and toks[first - 2] == "for"
                variable = (before in ";{}" or loop) and re.match(r"[A-Za-z_]", after)
                if variable and toks[end + 1] in ("=", ";", ":", "["):
                    found.append(f"variable '{' '.join(toks[first : end + 1])}'")
                elif (before, after) in (("(", ")"), ("<", ">"), ("<", ","), (",", ">")):
                    found.append(f"type '{' '.join(toks[first:end])}'")
    return [Problem(name, f"{what} names no address space") for what in found]


def _type_start(toks: list[str], star: int) -> int | None:
    """Index of the first token of the type before a `*` or `&`; None if there is no type."""
    i = star - 1
    if toks[i] == ">":
        depth = 0
        while i > 0:
            depth += (toks[i] == ">") - (toks[i] == "<")
            i -= 1
            if depth == 0:
                break
    if i < 1 or not re.match(r"[A-Za-z_]", toks[i]) or toks[i] == "return":
        return None
    while i > 1 and (re.match(r"[A-Za-z_]", toks[i - 1]) or toks[i - 1] == "::"):
        i -= 1
    return None if toks[i] == "return" else i


def _parameters_of(toks: list[str]) -> list[tuple[str, str]]:
    """Functions defined at file level, each with one of its parameters."""
    found = []
    depth = 0
    for i, t in enumerate(toks):
        depth += (t == "{") - (t == "}")
        if t == "(" and depth == 0 and i > 0 and re.match(r"[A-Za-z_]\w*$", toks[i - 1]):
            end, level = i, 0
            while end < len(toks):
                level += (toks[end] == "(") - (toks[end] == ")")
                if level == 0:
                    break
                end += 1
            if end + 1 < len(toks) and toks[end + 1] == "{":
                parts = metal.split_top(" ".join(toks[i + 1 : end]))
                found += [(toks[i - 1], part) for part in parts]
    return found


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def main(paths: list[str]) -> int:
    """Checks generated texts in files and prints what is wrong; 1 if anything is."""
    problems = []
    for path in paths:
        body = Path(path).read_text()
        name = re.search(r"\[\[kernel\]\]\s+void\s+(\w+)", body)
        if name is None:
            print(f"Error: no [[kernel]] in {path}.", file=sys.stderr)
            return 2
        problems += check_types(body, name.group(1))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
