"""Writes docs/models.md: what is compressed in every architecture of the installed mlx-lm.

    python scripts/models_table.py            # writes docs/models.md
    python scripts/models_table.py --check    # says whether the file is current
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_models import HELPERS, architectures, shared_model  # noqa: E402

from mlx_turbokv.kv_layers import KVLayers, kv_layers, own_caches  # noqa: E402

TARGET = ROOT / "docs" / "models.md"
REMARKS = {
    "bitnet": "without Metal, tested with plain operations in place of mlx-lm's Metal kernel",
    "muse_spark": "tested on GPUs alone: mlx-lm has its attention's kernels for nothing else",
    "olmo": "mlx-lm needs the package ai2-olmo for it, and takes prompts only a token at a time",
}
HEADER = """# What is compressed, by architecture

Written by `python scripts/models_table.py` over a tiny random model of each model file of mlx-lm
{version}. The tests run each through packed caches: a prompt in uneven cuts, 20 decoded tokens, a
trim, and more. Counts are those of the tiny models; real ones have more layers of the same kinds.
An entry of the cache list may hold two caches, so that both columns can speak of one layer. The
option --compress-sliding adds the layers of its column: those with a sliding window.

| architecture | caches | compressed | with --compress-sliding | left alone, and why | remark |
|---|---|---|---|---|---|
"""


def table() -> str:
    """The whole page."""
    rows = [_row(name) for name in architectures()]
    helpers = ", ".join(sorted(HELPERS))
    footer = f"\nModules of mlx_lm.models that hold no model: {helpers}.\n"
    return HEADER.format(version=version("mlx-lm")) + "".join(rows) + footer


def _row(name: str) -> str:
    model = shared_model(name)
    found = kv_layers(model)
    remark = REMARKS.get(name, "")
    left = "; ".join(_left_alone(found))
    added = len(kv_layers(model, compress_sliding=True).layers) - len(found.layers)
    cells = [name, len(own_caches(model)), len(found.layers), f"+{added}" if added else "", left]
    return f"| {' | '.join(map(str, cells))} | {remark} |\n"


def _left_alone(found: KVLayers) -> list[str]:
    counts: dict[str, int] = {}
    for entry in found.skipped:
        counts[entry.reason] = counts.get(entry.reason, 0) + 1
    return [f"{count} × {reason}" for reason, count in counts.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    text = table()
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.relative_to(ROOT)} is not current: run python scripts/models_table.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
