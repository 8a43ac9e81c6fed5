"""The default model's needle at 512 to 4,096 tokens, weights dequantised to half precision.

    python scripts/needle_default.py --json benchmarks/needle.json --time-limit 125

On an NVIDIA GPU this spares the compilation of MLX's quantised matmuls. An interrupted run, or one
that the time limit stopped, goes on where it was when it is started again.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click  # noqa: E402

from mlx_turbokv.cli import needle  # noqa: E402
from mlx_turbokv.cli.entry import run  # noqa: E402

CONFIGS = ("q8_0/q8_0", "q8_0/turbo3", "q8_0/turbo2", "la-v7", "turbo4/turbo3")


@click.command()
@click.option("--json", "json_path", required=True)
@click.option("--text", default="sample", show_default=True)
@click.option("--context", "contexts", multiple=True, type=int, default=needle.DEFAULT_CONTEXTS)
@click.option("--depths", default=5, show_default=True)
@click.option("--repeats", default=2, show_default=True)
@click.option("--dtype", default="float16", show_default=True)
@click.option("--backend", default="auto", show_default=True)
@click.option("--time-limit", default=None, type=float)
def command(json_path, text, contexts, depths, repeats, dtype, backend, time_limit) -> None:
    """Measure and write the record."""
    started = time.perf_counter()
    import mlx.core as mx

    from mlx_turbokv.evaluate.haystack import KINDS, make_cases
    from mlx_turbokv.evaluate.text import load_text
    from mlx_turbokv.loading.models import load

    cases = make_cases(contexts, needle.even_depths(depths), KINDS, repeats)
    loaded = load(dtype=getattr(mx, dtype), packed=False)
    deadline = None if time_limit is None else started + time_limit
    record = needle.measure(
        loaded, load_text(text), ["f16/f16", *CONFIGS], cases, backend, json_path, None, deadline
    )
    print(needle.render(record, "text"))
    if record["not_measured"]:
        print(f"{record['not_measured']} cases are left")


if __name__ == "__main__":
    run(command)
