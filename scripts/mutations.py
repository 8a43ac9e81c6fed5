#!/usr/bin/env python3
"""Plants defects in a copy of the tree, one at a time, and says which of them no test notices.

    python scripts/mutations.py [--only TEXT] [--list]

`planted.py` has the defects: a file, its text, what replaces it, and the tests that should fail.
A survivor that is right is marked there as equal, with the reason. The exit status is 1 where
another one survives or an equal one is caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from planted import PLANTED, Defect

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("mlx_turbokv", "metal", "tests", "scripts", "docs", "pyproject.toml", "README.md")
MOST_SECONDS = 300


def copy_tree(folder: Path) -> None:
    """The parts of the checkout that the tests need."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)


def outcome(folder: Path, defect: Defect) -> str:
    """What the tests say of the tree with this defect: caught, survived, or why neither."""
    path = folder / defect.file
    sound = path.read_text(encoding="utf-8")
    if sound.count(defect.old) != 1:
        return f"its text occurs {sound.count(defect.old)} times"
    path.write_text(sound.replace(defect.old, defect.new), encoding="utf-8")
    files, expression = defect.tests
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    command += ["-k", expression] if expression else []
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ran = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=MOST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {MOST_SECONDS} s"
    finally:
        path.write_text(sound, encoding="utf-8")
    if ran.returncode in (0, 1):
        return "caught" if ran.returncode else "survived"
    return f"pytest ended with status {ran.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="defects whose file or description has this")
    parser.add_argument("--list", action="store_true", help="only list them")
    args = parser.parse_args()
    chosen = [d for d in PLANTED if args.only in f"{d.file} {d.what}"]
    if args.list:
        for defect in chosen:
            print(f"{defect.file}: {defect.what}")
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        copy_tree(Path(name))
        for defect in chosen:
            began = time.perf_counter()
            found = outcome(Path(name), defect)
            good = found == ("survived" if defect.equal else "caught")
            wrong += not good
            reason = f" (right: {defect.equal})" if good and defect.equal else ""
            print(f"{found}{reason}: {defect.file}: {defect.what}"
                  f" [{time.perf_counter() - began:.0f} s]", flush=True)  # fmt: skip
    print(f"{len(chosen)} defects, {wrong} not as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
