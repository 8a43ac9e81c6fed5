#!/usr/bin/env python3
"""Perplexity and KLD of the paper's cache configurations on wikitext-2, for any model.

    python scripts/perplexity_wikitext2.py
    python scripts/perplexity_wikitext2.py --model mlx-community/Qwen3-4B-4bit --chunks 16
    python scripts/perplexity_wikitext2.py --model model.gguf --config turbo4/turbo3 --json out.json

Same protocol as llama-perplexity: windows that do not overlap, the second half of each scored. It
is the command `perplexity` with another list of configurations, and takes its options.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from mlx_turbokv.cli import perplexity
from mlx_turbokv.cli.entry import run

CONFIGS = (
    "f16/f16", "q8_0/q8_0",
    # the paper's layer-adaptive policies, and its modes by number
    "la-v5", "la-v6", "la-v7", "mode-1", "mode-2", "mode-10",
    # one pair of formats in every layer; the paper protects no tokens
    "q8_0/turbo4+0,0", "q8_0/turbo3+0,0", "q8_0/turbo2+0,0", "turbo4/turbo4+0,0",
    "turbo3/turbo3+0,0",
)  # fmt: skip
SHARED = [option for option in perplexity.command.params if option.name != "configs"]


@click.command(params=SHARED)
@click.option(
    "--config", "configs", multiple=True, metavar="CONFIG",
    help="Measured too: K/V (turbo4/turbo3), a policy or its JSON file, K/V@POLICY, or "
    "mlx-kvN:GROUP for mlx-lm's own quantised cache; repeatable.",
)  # fmt: skip
@click.option("--only", is_flag=True, help="Measure only f16/f16 and the --config ones.")
def command(configs: tuple[str, ...], only: bool, **options) -> None:
    """Perplexity and KLD of the paper's cache configurations on wikitext-2."""
    if only and not configs:
        raise click.UsageError("--only needs at least one --config.")
    names = configs if only else (*CONFIGS, *configs)
    perplexity.command.callback(configs=names, **options)


if __name__ == "__main__":
    run(command)
