"""The paper's comparison on wikitext-2, for any model: the tables of the README.

    python scripts/perplexity_wikitext2.py --chunks 16 --json benchmarks/perplexity.json
    python scripts/perplexity_wikitext2.py --set paper --model ID --text FILE

`--set table` (default) is what the command runs by itself; `--set paper` adds f16 boundaries;
`--set peers` compares with mlx-lm's own quantised caches. Other options are the command's.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlx_turbokv.cli.perplexity import command  # noqa: E402
from mlx_turbokv.cli.entry import run  # noqa: E402

SETS = {
    "table": (),
    "paper": (
        "q8_0/q8_0", "q8_0/turbo3", "q8_0/turbo2", "la-v5", "la-v6", "la-v7", "mode-10",
        "q8_0/turbo2@boundary:2,2:f16", "q8_0/turbo2@boundary:4,4:f16",
    ),
    "peers": (
        "q8_0/q8_0", "turbo6/turbo6", "turbo5/turbo5", "turbo4/turbo4", "turbo4/turbo3",
        "turbo3/turbo3", "mlx-kv8:64", "mlx-kv8:32", "mlx-kv4:64", "mlx-kv4:32", "mlx-kv3:64",
        "mlx-kv3:32", "mlx-kv2:64", "mlx-kv2:32",
    ),
}  # fmt: skip


def expanded(arguments: list[str]) -> list[str]:
    """The command's arguments, with --set NAME replaced by its configurations."""
    if "--set" not in arguments:
        return arguments
    at = arguments.index("--set")
    name = arguments[at + 1] if at + 1 < len(arguments) else ""
    if name not in SETS:
        sys.exit(f"Error: Unknown set {name!r}: accepted are {', '.join(SETS)}.")
    configs = [word for config in SETS[name] for word in ("--config", config)]
    return arguments[:at] + configs + arguments[at + 2 :]


if __name__ == "__main__":
    run(command, expanded(sys.argv[1:]))
