"""What is compressed in every architecture of the installed mlx-lm, as tiny models have it.

python scripts/models_table.py && python scripts/results.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests" / "helpers")]

from record import record  # noqa: E402
from tiny_models import HELPERS, architectures, shared_model  # noqa: E402

from mlx_turbokv.cli.output import write_json  # noqa: E402
from mlx_turbokv.model.caches import own_caches  # noqa: E402
from mlx_turbokv.model.kv_layers import KVLayers, kv_layers  # noqa: E402

REMARKS = {
    "bitnet": "without Metal, tested with plain operations in place of mlx-lm's Metal kernel",
    "muse_spark": "tested on GPUs alone: mlx-lm has its attention's kernels for nothing else",
    "olmo": "mlx-lm needs the package ai2-olmo for it, and takes prompts only a token at a time",
}


def rows() -> list[dict]:
    """What happens to the caches of every architecture."""
    return [_row(name) for name in architectures()]


def _row(name: str) -> dict:
    model = shared_model(name)
    found = kv_layers(model)
    return {
        "architecture": name,
        "caches": len(own_caches(model)),
        "compressed": len(found.layers),
        "added_with_sliding": len(kv_layers(model, compress_sliding=True).layers)
        - len(found.layers),
        "left_alone": _left_alone(found),
        "remark": REMARKS.get(name, ""),
    }


def _left_alone(found: KVLayers) -> list[str]:
    counts: dict[str, int] = {}
    for entry in found.skipped:
        counts[entry.reason] = counts.get(entry.reason, 0) + 1
    return [f"{count} × {reason}" for reason, count in counts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=str(ROOT / "benchmarks" / "models.json"))
    found = record(what="caches by architecture", helpers=sorted(HELPERS), rows=rows())
    write_json(parser.parse_args().json, found)


if __name__ == "__main__":
    main()
