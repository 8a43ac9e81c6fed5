#!/usr/bin/env python3
"""Runs a part of doctor's checks, every n-th variant, so that processes can share them.

    python scripts/doctor_part.py 0/6 --json doctor0.json

NVIDIA's compiler takes a quarter of an hour for the kernels of all variants.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlx_turbokv import doctor
from mlx_turbokv.cli.output import print_status, write_json
from mlx_turbokv.doctor.report import as_markdown
from mlx_turbokv.doctor.variants import variant_set


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", metavar="I/N")
    parser.add_argument("--backend", default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    index, n = (int(number) for number in args.part.split("/"))
    chosen = variant_set()[index::n]
    record = doctor.examine(backend=args.backend, times=False, chosen=chosen, progress=print_status)
    print(as_markdown(record))
    if args.json is not None:
        write_json(args.json, record)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
