#!/usr/bin/env python3
"""Runs bench_kernels.py with the package of another tree.

    python scripts/bench_against.py ../before --warm 0/4

compiles the kernels of that tree; ``bench_kernels.py --against ../before`` runs this itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import mlx_turbokv  # noqa: E402 - that tree's

# isort: split
import bench_kernels

if __name__ == "__main__":
    tree = Path(sys.argv[1]).resolve()
    if tree not in Path(mlx_turbokv.__file__).resolve().parents:
        sys.exit(f"{tree} has no mlx_turbokv.")
    sys.exit(bench_kernels.main(sys.argv[2:]))
