"""Pages of docs/results, made from the records in benchmarks/ (scripts/results.py writes them)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mlx_turbokv.evaluate.notes import may_protect
from mlx_turbokv.evaluate.tables import Table

ROOT = Path(__file__).resolve().parents[2]
# The last commit that has the scripts and records of settled research.
SETTLED = "e1a90eb"


def read(name: str) -> dict:
    """A record of benchmarks/."""
    return json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""
    return Table(header, rows).markdown()


def source(name: str, record: dict | None = None, up: str = "../..") -> str:
    """Where figures come from: device, versions, commit, record and the command that made it.

    ``up`` leads from the page to the repository.
    """
    record = read(name) if record is None else record
    about = {**record.get("environment", {}), **record}
    versions = [f"{k.replace('mlx_lm', 'mlx-lm')} {about[k]}"
                for k in ("mlx", "mlx_lm", "mlx_turbokv") if about.get(k)]  # fmt: skip
    parts = [about["device"], *versions]
    parts += [f"back-end {about['backend']}"] if about.get("backend") else []
    commit = f"commit {about['commit']}" if about.get("commit") else "commit not recorded"
    parts += [commit, *([about["date"]] if about.get("date") else [])]
    path = f"benchmarks/{name}.json"
    text = f"{', '.join(parts)}.{_protection(record)} Record: [{path}]({up}/{path})."
    return f"{text}\n\n{commands(about['command'])}"


def _protection(record: dict) -> str:
    """A sentence where a record's configurations could have protected tokens and none did."""
    names, found = [], []
    for row in _dicts(record):
        protected = row.get("protected")  # of a row, or by configuration
        found += protected.values() if isinstance(protected, dict) else [protected]
        names += [row[key] for key in ("config", "policy") if isinstance(row.get(key), str)]
    if any(found) or not any(map(may_protect, names)):
        return ""
    return " No tokens were protected (`+0,0` after a configuration's name)."


def _dicts(node: object) -> Iterator[dict]:
    """A record and all objects in it."""
    if isinstance(node, dict):
        yield node
    if isinstance(node, (dict, list)):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _dicts(part)


def commands(*lines: str, commit: str = SETTLED) -> str:
    """Commands as a block; a script that the tree no longer has is named with its commit."""
    shown = []
    for line in dict.fromkeys(lines):
        first = line.split()[0]
        gone = first.endswith(".py") and not (ROOT / first).is_file()
        shown.append(line + (f"  # script: commit {commit}" if gone else ""))
    return "\n".join(["```", *shown, "```"])


def span(values, digits: int = 0) -> str:
    """The least and the most of some numbers."""
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}" if values else "–"


def interval(found: dict, spec: str) -> str:
    """A mean with its 95 % interval."""
    low, high = found["interval"]
    return f"{found['mean']:{spec}} ({low:{spec}} to {high:{spec}})"


def power(x: float) -> str:
    """One digit and a power of ten, as 5e-7."""
    return f"{x:.0e}".replace("e-0", "e-")
