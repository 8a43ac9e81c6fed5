"""Draw the recorded figures into README.md and docs/, between their marks (scripts/figures).

python scripts/readme_figures.py           # rewrite
python scripts/readme_figures.py --check   # fail if a page differs
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import (  # noqa: E402, F401
    drawn,  # noqa: E402
    long_checks,
    sparse,
    whole_model,
)


def pages() -> list[Path]:
    """The pages that have figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    differing = []
    for path in pages():
        before = path.read_text(encoding="utf-8")
        try:
            after = drawn(before)
        except ValueError as error:
            sys.exit(f"{path.relative_to(ROOT)}: {error}.")
        if before == after:
            continue
        differing.append(str(path.relative_to(ROOT)))
        if "--check" not in sys.argv:
            path.write_text(after, encoding="utf-8")
    if differing and "--check" in sys.argv:
        sys.exit(f"{', '.join(differing)}: differs from the records.")
    print(f"drawn: {', '.join(differing) or 'nothing has changed'}")


if __name__ == "__main__":
    main()
