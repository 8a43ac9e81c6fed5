"""Does the package store and attend to what its formats say? Against the NumPy simulation.

Evaluates the eleven default configurations over the same windows twice, through the package's
caches and through the tests' simulation (float64 quantise–dequantise into mlx-lm's own KVCache),
and prints the largest difference of a window's mean loss. Fails above the tolerance. What the
package stored is shown to the simulation for ties alone: tests/simulation.py says why, and the
last column says how often.

    TURBOKV_WIKITEXT=FILE python scripts/simulation_agreement.py --chunks 16
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import click  # noqa: E402
import numpy as np  # noqa: E402
from simulation import SimulatedCache, layer_formats, share_asked, window_nll  # noqa: E402

from mlx_turbokv.evaluate.configuration import DEFAULT_CONFIGS, prepare  # noqa: E402
from mlx_turbokv.evaluate.divergence import Reference  # noqa: E402
from mlx_turbokv.evaluate.record import command_line, environment, model_record  # noqa: E402
from mlx_turbokv.evaluate.text import load_text  # noqa: E402
from mlx_turbokv.evaluate.windows import cut_windows, scored_logits, targets_of  # noqa: E402
from mlx_turbokv.loading.models import load  # noqa: E402  (finds OpenBLAS before MLX is imported)
from mlx_turbokv.quant.quantize import K_SCALE_RULE, V_SCALE_RULE  # noqa: E402

TOLERANCE = 2e-3  # nats, of a window's mean loss


def compare(model, window: np.ndarray, config) -> tuple[float, float, float]:
    """Mean loss of a window through the package and the simulation, and the share of ties."""
    caches = config.make_caches()
    logits = scored_logits(model, window, caches)
    package = Reference(logits, targets_of(window)).own_stats().nll
    simulated = [
        SimulatedCache(k, v, K_SCALE_RULE, V_SCALE_RULE, stored=cache.keys_and_values())
        for cache, (k, v) in zip(caches, layer_formats(config.name, len(caches)))
    ]
    losses = window_nll(model, window.tolist(), simulated)
    means = (float(np.mean(x, dtype=np.float64)) for x in (package, losses))
    return *means, share_asked(simulated)


@click.command()
@click.option("--text", default=lambda: os.environ.get("TURBOKV_WIKITEXT", "sample"))
@click.option("-c", "--ctx-size", default=512, show_default=True)
@click.option("--chunks", default=16, show_default=True)
@click.option("--json", "json_path", default=str(ROOT / "benchmarks/simulation_agreement.json"))
def main(text, ctx_size, chunks, json_path):
    loaded, source = load(), load_text(text)
    windows = cut_windows(loaded.tokenizer, source.text, ctx_size, chunks)
    configs = [prepare(loaded.model, name) for name in DEFAULT_CONFIGS]
    rows = {name: {"package": [], "simulation": [], "ties": []} for name in DEFAULT_CONFIGS}
    for i, window in enumerate(windows):
        for config in configs:
            values = compare(loaded.model, window, config)
            for column, value in zip(rows[config.name].values(), values):
                column.append(value)
        print(f"window {i + 1}/{len(windows)}", file=sys.stderr)
    for row in rows.values():
        gaps = np.subtract(row["package"], row["simulation"])
        row["max_abs_difference"] = float(np.max(np.abs(gaps)))
        row["share_of_ties"] = float(np.mean(row.pop("ties")))
    print(f"{'':16}{'max |Δnll|':>12}{'ties':>10}")
    for name, row in rows.items():
        print(f"{name:16}{row['max_abs_difference']:12.2e}{row['share_of_ties']:10.2%}")
    worst = max(row["max_abs_difference"] for row in rows.values())
    record = {
        "what": "per-window mean nll, package against the NumPy simulation",
        "model": model_record(loaded),
        "text": {"name": source.name, "sha256": source.sha256},
        "n_ctx": ctx_size,
        "n_windows": len(windows),
        "tolerance": TOLERANCE,
        "worst": worst,
        "agrees": worst <= TOLERANCE,
        "command": f"python {command_line()}",
        "environment": environment(),
        "results": rows,
    }
    Path(json_path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if worst <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
