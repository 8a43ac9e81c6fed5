"""Run a command of this checkout, without an installed package.

python scripts/command.py bench --shape Llama-3.1-8B --context 8192
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from mlx_turbokv.cli.entry import run

    if len(sys.argv) < 2:
        sys.exit("Error: name a command, such as bench.")
    name = sys.argv.pop(1)
    sys.argv[0] = f"mlx_turbokv.{name}"  # what the record says of how it was made
    run(importlib.import_module(f"mlx_turbokv.cli.{name}").command)
