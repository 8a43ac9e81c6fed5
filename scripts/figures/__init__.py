"""What README.md and docs/ draw from the records of benchmarks/, by name.

A figure is a function without arguments that returns its text, or several texts by key. The mark
`<!-- begin: NAME -->`, or `<!-- begin: NAME.KEY -->`, stands before the place of a text and
`<!-- end -->` behind it: each on a line of its own around a table or paragraph, or both within a
line around a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIGURES: dict[str, Callable[[], str | dict[str, str]]] = {}
MARK = re.compile(r"<!-- (begin: (?P<name>[\w.]+)|end) -->")


def figure(function: Callable) -> Callable:
    """Registers a figure under the function's name."""
    if function.__name__ in FIGURES:
        raise ValueError(f"two figures have the name {function.__name__}")
    FIGURES[function.__name__] = function
    return function


def read(name: str) -> dict:
    """A record of benchmarks/."""
    return json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text_of(name: str) -> str:
    """The text of a figure, or of one key of it.

    Raises: ValueError for a name that no figure has.
    """
    figure_name, _, key = name.partition(".")
    found = FIGURES[figure_name]() if figure_name in FIGURES else None
    text = found.get(key) if isinstance(found, dict) else None if key else found
    if text is None:
        raise ValueError(f"there is no figure {name}")
    return text


def drawn(page: str) -> str:
    """A page with every figure drawn anew.

    Raises: ValueError for marks that do not match, or a name that no figure has.
    """
    parts, at, open_mark = [], 0, None
    for mark in MARK.finditer(page):
        name = mark["name"]
        if (name is None) == (open_mark is None):
            raise ValueError(f"a mark without its other: {mark[0]} at character {mark.start()}")
        if name is None:
            inline = page[open_mark.end()] != "\n"
            text = text_of(open_mark["name"])
            parts.append(text if inline else f"\n\n{text}\n\n")
        else:
            parts.append(page[at : mark.end()])
        at = mark.start() if name is None else mark.end()
        open_mark = None if name is None else mark
    if open_mark is not None:
        raise ValueError(f"a mark without its other: {open_mark[0]}")
    return "".join([*parts, page[at:]])
