#!/usr/bin/env python3
"""Registers of the kernels by clang's back-end for AMD GPUs, and the most that they may take.

    python scripts/register_ceilings.py            # the figures, and other ceilings
    python scripts/register_ceilings.py --write    # the figures become the ceilings

A test refuses a variant that takes more than its ceiling in tests/kernels/register_ceilings.json.
A kernel that now takes less keeps it: write it then. Figures are those of one version of clang.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts")]

from apple_variants import SHORT_PAIRS, Variant, variants  # noqa: E402
from metal_host.amdgpu import Registers, clang_version, of_many, registers  # noqa: E402

CEILINGS = ROOT / "tests/kernels/register_ceilings.json"
MAIN_DIM, MAIN_ROWS = 128, 4


def chosen() -> list[Variant]:
    """The variants that tests compile, few enough for a test.

    All rows of the two main pairs at head_dim 128, and four rows of everything else: of the other
    pairs at 128, of the two pairs at other head dims; centred and not. One pass over all tokens
    differs from a split by its end only, which four rows show. With protected tokens: four rows of
    the main pairs at 128.
    """
    found = []
    for variant in variants():
        main_pair, main_dim = variant.pair in SHORT_PAIRS, variant.head_dim == MAIN_DIM
        if variant.kernel == "decode_partial":
            many = main_pair and main_dim
            rows = many or (variant.rows == MAIN_ROWS and (main_pair or main_dim))
            whole = many and variant.rows == MAIN_ROWS and not variant.centred
            wanted = rows and (variant.how == "split" or (variant.how == "whole" and whole))
        elif variant.kernel == "decode_protected":
            wanted = main_pair and main_dim and variant.rows == MAIN_ROWS
        else:
            wanted = main_pair and (main_dim or variant.kernel == "decode_merge")
        if wanted:
            found.append(variant)
    return found


def measured() -> dict[str, Registers]:
    """Registers of the chosen variants, by name."""
    found = chosen()
    return dict(zip([v.name for v in found], of_many(registers, [v.launch for v in found])))


def read() -> tuple[int, dict[str, Registers]]:
    """The version of clang that the ceilings are of, and the ceilings."""
    record = json.loads(CEILINGS.read_text(encoding="utf-8"))
    return record["clang"], {name: Registers(*row) for name, row in record["ceilings"].items()}


def excess(found: dict[str, Registers], ceilings: dict[str, Registers]) -> list[str]:
    """One sentence for each variant that takes more than its ceiling, or has none."""
    sentences = []
    for name in sorted({*found, *ceilings}):
        if name not in ceilings:
            sentences.append(f"{name} has no ceiling.")
        elif name not in found:
            sentences.append(f"{name} has a ceiling and is no variant.")
        else:
            for field, n, most in zip(Registers._fields, found[name], ceilings[name]):
                if n > most:
                    sentences.append(f"{name}: {n} {field}, at most {most}.")
    return sentences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="make the figures the ceilings")
    args = parser.parse_args()
    found = measured()
    clang, ceilings = read() if CEILINGS.is_file() else (clang_version(), {})
    for name, row in found.items():
        was = ceilings.get(name, row)
        note = "" if was == row else f"   ceiling {', '.join(map(str, was))}"
        print(f"{name:45} {', '.join(f'{n} {field}' for field, n in row._asdict().items())}{note}")
    if clang != clang_version():
        print(f"The ceilings are of clang {clang}, and this is clang {clang_version()}.")
    if args.write:
        rows = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in sorted(found.items()))
        head = f'{{"clang": {clang_version()}, "fields": {json.dumps(Registers._fields)},'
        CEILINGS.write_text(f'{head}\n "ceilings": {{\n{rows}\n}}}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
