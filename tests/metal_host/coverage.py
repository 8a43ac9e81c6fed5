"""Which lines of metal/ ran, from the compiler's own counters.

`METAL_HOST_COVERAGE=DIR python -m pytest tests` leaves the counters in DIR, and `PYTHONPATH=tests
python -m metal_host.coverage DIR` prints the shares and fails below 100 %.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from .toolchain import REPOSITORY, cache_folder, gcov

_STATEMENT = re.compile(r"^(return\b|[\w.\[\]()*&>\- +]+\s*[-+*/|&^%<>]*=[^=]|[\w:<>, ]+\()")
_NO_CODE = re.compile(
    r"^(static\s+|const\s+)*(constexpr|constant|static_assert|using|typedef|extern)\b"
)


@functools.cache
def session_folder() -> Path:
    """A new folder for the counters of this session; METAL_HOST_COVERAGE names another."""
    named = os.environ.get("METAL_HOST_COVERAGE")
    if named:
        Path(named).mkdir(parents=True, exist_ok=True)
        return Path(named)
    return Path(tempfile.mkdtemp(prefix="coverage-", dir=cache_folder()))


@dataclass(frozen=True)
class FileCoverage:
    """One file of metal/: lines with code, those of them that ran, and those never compiled."""

    name: str
    lines: frozenset[int]
    ran: frozenset[int]
    never_compiled: frozenset[int]

    @property
    def missed(self) -> list[int]:
        """Lines that no run reached, whether compiled into some variant or into none."""
        return sorted((self.lines - self.ran) | self.never_compiled)


def collect(folder: Path) -> dict[str, FileCoverage]:
    """Coverage of every file of metal/ (compat aside) from the counters below a folder."""
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for counters in sorted(folder.rglob("*.gcda")):
        original = Path("/") / counters.relative_to(folder)
        notes = original.with_suffix(".gcno")
        if not notes.exists():
            continue
        shutil.copy(notes, counters.with_suffix(".gcno"))
        subprocess.run(
            [gcov(), "--json-format", "--object-directory", ".", counters.name],
            cwd=counters.parent, capture_output=True, check=True,
        )  # fmt: skip
        for report in counters.parent.glob("*.gcov.json.gz"):
            for entry in json.loads(gzip.decompress(report.read_bytes()))["files"]:
                name = re.search(r"(?:^|/)(metal/[^/]+)$", entry["file"])
                if name:
                    for line in entry["lines"]:
                        counts[name.group(1)][line["line_number"]] += line["count"]
            report.unlink()
    out = {}
    for path in sorted((REPOSITORY / "metal").glob("*.*")):
        name = f"metal/{path.name}"
        lines = frozenset(counts[name])
        ran = frozenset(n for n, count in counts[name].items() if count > 0)
        statements = statement_lines(path.read_text())
        out[name] = FileCoverage(name, lines, ran, frozenset(statements) - lines)
    return out


def statement_lines(text: str) -> list[int]:
    """Lines inside function bodies that certainly hold code: assignments, calls, returns.

    A branch that no variant instantiates leaves no trace in the counters; its lines are found
    here. Declarations without a value, constants and continued lines are not counted, nor are
    functions that the compiler evaluates (constexpr, or a macro whose name says CONST_FN).
    """
    found = []
    depth = 0
    evaluated = False
    begins = True  # whether the line before ended a statement
    in_macro = False
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"//.*$", "", raw).strip()
        if in_macro or line.startswith("#"):
            in_macro = line.endswith("\\")
            continue
        if not line:
            continue
        if depth == 0 and "(" in line:
            evaluated = re.search(r"\bconstexpr\b|CONST_FN\b", line) is not None
        statement = begins and depth > 0 and line.endswith(";") and not evaluated
        if statement and _STATEMENT.match(line) and not _NO_CODE.match(line):
            found.append(number)
        depth += line.count("{") - line.count("}")
        begins = line.endswith((";", "{", "}", ":")) or line.startswith("TKV_UNROLL")
    return found


def report(coverage: dict[str, FileCoverage]) -> str:
    """One line a file, with the lines that did not run."""
    rows = []
    for c in coverage.values():
        total = len(c.lines | c.never_compiled)
        share = 100.0 * (total - len(c.missed)) / total if total else 100.0
        missed = f"  not run: {ranges(c.missed)}" if c.missed else ""
        rows.append(
            f"{c.name:<28} {total - len(c.missed):>4} of {total:>4} lines {share:6.2f} %{missed}"
        )
    return "\n".join(rows)


def ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as 1-3, 7."""
    out: list[list[int]] = []
    for n in numbers:
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def main(arguments: list[str]) -> int:
    """Prints the coverage of the counters in a folder; 1 unless every line ran."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("Error: give the folder that METAL_HOST_COVERAGE named.", file=sys.stderr)
        return 2
    coverage = collect(Path(arguments[0]))
    print(report(coverage))
    return 1 if any(c.missed for c in coverage.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
