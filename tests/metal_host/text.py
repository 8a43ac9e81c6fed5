"""Reads and rewrites Metal text: signatures, threadgroup variables, the word `constant`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""[A-Za-z_]\w*|\d[\w.]*(?:(?<=[eE])[+-]\w+)?|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\s+|::|."""
)
_LINE = re.compile(r"^\s*#.*$", re.M)
_INSTANCE = re.compile(
    r'^template \[\[host_name\("[^"]*"\)\]\] \[\[kernel\]\] decltype\(.*\) (.*);\s*$', re.M
)
_SPECIFIERS = {"const", "constant", "static", "constexpr", "inline", "volatile", "device", "thread"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its declaration, and its buffer's index or its attribute."""

    declaration: str
    name: str
    buffer: int | None
    attribute: str | None


@dataclass(frozen=True)
class Variable:
    """One threadgroup variable: `type name dimensions`, e.g. ("float", "sums", "[32]")."""

    type: str
    name: str
    dimensions: str


@dataclass(frozen=True)
class Kernel:
    """A kernel in a text: `call` is its name with template arguments."""

    name: str
    call: str
    parameters: tuple[Parameter, ...]


def instance(text: str) -> tuple[str, str | None]:
    """The text without MLX's instantiation line, and what that line instantiates."""
    found = _INSTANCE.search(text)
    if found is None:
        return text, None
    return text[: found.start()] + "\n" + text[found.end() :], found.group(1)


def tokens(text: str) -> list[str]:
    """Words, punctuation and white space; a preprocessor line is one token."""
    out: list[str] = []
    at = 0
    for line in _LINE.finditer(text):
        out += _TOKEN.findall(text[at : line.start()])
        out.append(line.group(0))
        at = line.end()
    return out + _TOKEN.findall(text[at:])


def _blank(token: str) -> bool:
    return token.isspace() or token.startswith("#")


def split_top(text: str, separator: str = ",") -> list[str]:
    """Splits at separators outside every bracket, template brackets included."""
    parts: list[str] = []
    depth = angle = last = 0  # < and > inside other brackets are shifts and comparisons
    for i, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c in "<>" and depth == 0:
            angle += 1 if c == "<" else -1
        elif c == separator and depth == 0 and angle == 0:
            parts.append(text[last:i])
            last = i + 1
    parts.append(text[last:])
    return [p for p in (p.strip() for p in parts) if p]


def closing(toks: list[str], at: int, opening: str, closing: str) -> int:
    """Index of the token that closes the bracket at token `at`."""
    depth = 0
    for i in range(at, len(toks)):
        if toks[i] == opening:
            depth += 1
        elif toks[i] == closing:
            depth -= 1
            if depth == 0:
                return i
    raise ValueError(f"no {closing!r} closes the {opening!r} in the kernel text")


def find_kernel(text: str, name: str, call: str | None = None) -> Kernel:
    """The kernel `name` of a text, with its parameters.

    Raises:
        ValueError: there is no such kernel, or a parameter that cannot be understood.
    """
    found = re.search(r"\[\[kernel\]\]\s+void\s+" + re.escape(name) + r"\s*\(", text)
    if found is None:
        found = re.search(r"\bkernel\s+void\s+" + re.escape(name) + r"\s*\(", text)
    if found is None:
        raise ValueError(f"no kernel named {name} in the text")
    toks = tokens(text[found.end() - 1 :])
    inner = "".join(t for t in toks[1 : closing(toks, 0, "(", ")")] if not t.startswith("#"))
    parameters = []
    next_buffer = 0
    for part in split_top(inner):
        attributes = re.findall(r"\[\[(.*?)\]\]", part, re.S)
        declaration = re.sub(r"\[\[.*?\]\]", "", part, flags=re.S).strip()
        names = re.findall(r"[A-Za-z_]\w*", declaration)
        pointer = "*" in declaration or "&" in declaration
        buffer = re.search(r"\bbuffer\((\d+)\)", " ".join(attributes))
        if buffer or pointer:
            index = int(buffer.group(1)) if buffer else next_buffer
            next_buffer = index + 1
            parameters.append(Parameter(declaration, names[-1], index, None))
        elif attributes:
            parameters.append(Parameter(declaration, names[-1], None, attributes[0].strip()))
        else:
            raise ValueError(f"parameter {part!r} of {name} is neither a buffer nor an attribute")
    return Kernel(name, call or name, tuple(parameters))


def _threadgroup_declaration(toks: list[str], at: int) -> tuple[int, list[Variable]] | None:
    """The variables that the `threadgroup` at token `at` declares, and the index of the `;`.

    None where it qualifies a pointer or a reference.
    """
    depth = 0
    body: list[str] = []
    for end in range(at + 1, len(toks)):
        t = toks[end]
        if t in "([{":
            depth += 1
        elif t in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif depth == 0 and t == ";":
            break
        elif depth == 0 and (t in "*&" or t == "="):
            return None
        body.append(" " if _blank(t) else t)
    else:
        return None
    declarators = split_top("".join(body).strip())
    first = re.match(r"^(.*?[\s>])([A-Za-z_]\w*)\s*((?:\[.*\])?)$", declarators[0], re.S)
    if first is None:
        return None
    kind = first.group(1).strip()
    variables = [Variable(kind, first.group(2), first.group(3))]
    for other in declarators[1:]:
        match = re.match(r"^([A-Za-z_]\w*)\s*((?:\[.*\])?)$", other, re.S)
        if match is None:
            return None
        variables.append(Variable(kind, match.group(1), match.group(2)))
    return end, variables


def rewrite_threadgroup(text: str, declare) -> tuple[str, list[Variable]]:
    """Replaces declarations of threadgroup variables by `declare(variable, number)`.

    The qualifier of pointers and references stays. Returns the text and all variables.
    """
    toks = tokens(text)
    out: list[str] = []
    variables: list[Variable] = []
    i = 0
    while i < len(toks):
        found = _threadgroup_declaration(toks, i) if toks[i] == "threadgroup" else None
        if found is None:
            out.append(toks[i])
            i += 1
            continue
        end, declared = found
        for variable in declared:
            out.append(declare(variable, len(variables)))
            variables.append(variable)
        out += [t for t in toks[i:end] if t.startswith("#") or "\n" in t]
        i = end + 1
    return "".join(out), variables


def rewrite_constant(text: str) -> str:
    """`constant` becomes `const`, once in a run of specifiers."""
    toks = tokens(text)
    run: list[int] = []

    def end_run() -> None:
        here = [i for i in run if toks[i] in ("const", "constant")]
        if any(toks[i] == "constant" for i in here):
            for n, i in enumerate(here):
                toks[i] = "const" if n == 0 else ""
        run.clear()

    for i, t in enumerate(toks):
        if t in _SPECIFIERS:
            run.append(i)
        elif not _blank(t):
            end_run()
    end_run()
    return "".join(toks)


def drop_includes(text: str) -> str:
    """Blanks lines that include Metal's headers or are `#pragma once`."""
    return re.sub(r"^\s*#\s*(include\s*<metal_\w+>|pragma\s+once).*$", "", text, flags=re.M)


def set_function_constants(text: str, values: dict[str, object]) -> str:
    """Gives `constant T name [[function_constant(n)]];` its value."""
    for name, value in values.items():
        literal = str(value).lower() if isinstance(value, bool) else str(value)
        text, n = re.subn(
            r"(constant\s+\w+\s+" + re.escape(name) + r")\s*\[\[function_constant\(\d+\)\]\];",
            r"\1 = " + literal + ";",
            text,
        )
        if n != 1:
            raise ValueError(f"{n} function constants named {name} in the text")
    return text
