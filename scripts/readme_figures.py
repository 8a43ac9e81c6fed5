"""Draw the recorded figures into README.md, between its begin and end marks.

    python scripts/readme_figures.py           # rewrite
    python scripts/readme_figures.py --check   # fail if the README differs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mlx_turbokv.evaluate.table import as_markdown, footnotes, heading  # noqa: E402


def perplexity() -> str:
    """The table of benchmarks/perplexity.json, with the command that made it."""
    record = json.loads((ROOT / "benchmarks/perplexity.json").read_text(encoding="utf-8"))
    heading_lines = heading(record).replace("\n", "; ")
    return "\n\n".join(
        [f"{heading_lines}.", as_markdown(record["results"]), footnotes(record),
         f"`{record['command']}`"]
    )  # fmt: skip


SECTIONS = {"perplexity": perplexity}


def drawn(readme: str) -> str:
    """The README with every section drawn anew."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        head, rest = readme.split(begin)
        tail = rest.split(end)[1]
        readme = f"{head}{begin}\n\n{section()}\n\n{end}{tail}"
    return readme


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = drawn(before)
    if "--check" in sys.argv:
        sys.exit("README.md differs from the records." if before != after else 0)
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
