"""What a planted defect is, and which tests should notice it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from kernel_cases import ALL_CASES
from segment_cases import CASES as SEGMENT_CASES

Tests = tuple[tuple[str, ...], str]


class Defect(NamedTuple):
    """A text of a file, what replaces it, and the tests that should notice.

    Args:
        tests: files or tests, and an expression for pytest's -k.
        equal: why the changed code is as right; empty for a defect.
    """

    what: str
    file: str
    old: str
    new: str
    tests: Tests
    equal: str = ""


def matching(all_cases: list, words: tuple[str, ...]) -> list:
    """The cases whose names have all of these words.

    Raises: ValueError where none has.
    """
    found = [c for c in all_cases if all(w in f" {c} " for w in words)]
    if not found:
        raise ValueError(f"no case has {words}")
    return found


def cases(*words: str, most: int = 6) -> Tests:
    """Kernel cases whose names have all of these words, those of few values first."""
    found = matching(ALL_CASES, words)
    found.sort(key=lambda c: sum(c.dims) * sum(c.tokens))
    test = "tests/kernels/test_kernels.py::test_case_agrees_with_float64"
    return tuple(f"{test}[{case}]" for case in found[:most]), ""


def protected(*words: str) -> Tests:
    """Cases of protected tokens whose names have all of these words."""
    found = matching(SEGMENT_CASES, words)
    test = "tests/kernels/test_protected_kernels.py::test_protected_case_agrees_with_float64"
    return tuple(f"{test}[{case}]" for case in found), ""
