#!/usr/bin/env python3
"""Boundary V by ordinal of KV layers against raw layer index, on a model with sliding windows.

    python scripts/boundary_layers.py --model gemma-3-270m.gguf --text FILE -c 1024 --chunks 4 \\
        --json benchmarks/boundary_gemma.json

K is q8_0, V turbo2 with a scale per 32 values, and q8_0 in the layers that a choice protects. Once
only the layers whose cache grows are packed, every subset of them protected, and once all layers
are, as the paper's code does it: those that raw indices name beside those that grow, equally many.
No tokens are protected. The record is written after each configuration; the same command goes on.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import click  # noqa: E402
from quality_table import CACHE_LIMIT, measure_length, start_record  # noqa: E402
from unprotected_windows import Choice, Unprotected  # noqa: E402

from mlx_turbokv.cli import options  # noqa: E402
from mlx_turbokv.cli.entry import run  # noqa: E402
from mlx_turbokv.cli.runs import load_model  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.kernels.backend import select_backend  # noqa: E402
from mlx_turbokv.policy import LayerList  # noqa: E402
from mlx_turbokv.quant.formats import as_format  # noqa: E402

WHAT = "boundary layers by ordinal and by raw index"
K, V, PROTECTED_V = "q8_0", "turbo2:32", "q8_0"
MOST_GROWING = 5  # of which every subset is measured
RAW = ((1, 1), (2, 1), (2, 2))  # first and last layers by raw index


class Layers:
    """Where a model's layers stand.

    all: raw indices of those that keep K and V.
    growing: of those without a window.
    window: tokens of the others' windows.
    """

    def __init__(self, model: Any) -> None:
        from mlx_turbokv.model.kv_layers import kv_layers

        layers = kv_layers(model, None, True).layers
        self.all = [x.index for x in layers]
        self.growing = [x.index for x in layers if x.window is None]
        self.window = max((x.window or 0 for x in layers), default=0)
        if not 0 < len(self.growing) <= MOST_GROWING or self.growing == self.all:
            raise InputError(
                f"This model has {len(self.growing)} KV layers that grow and "
                f"{len(self.all) - len(self.growing)} with windows: accepted are 1 to "
                f"{MOST_GROWING} that grow, and some with windows."
            )


def subsets(layers: Layers) -> dict[str, dict[str, Any]]:
    """What is protected, by the configuration's name: raw indices, and which layers are packed."""
    found: dict[str, dict[str, Any]] = {}

    def add(indices: list[int], packs_windows: bool) -> None:
        packed = "all" if packs_windows else "growing"
        name = f"{packed} packed, protected {','.join(map(str, indices)) or 'none'}"
        found[name] = {"protected": indices, "packs_windows": packs_windows}

    for n in range(len(layers.growing) + 1):
        for indices in combinations(layers.growing, n):
            add(list(indices), False)
    add([], True)
    for first, last in RAW:
        add(sorted({*layers.all[:first], *layers.all[len(layers.all) - last :]}), True)
    add(sorted({layers.growing[0], layers.growing[-1]}), True)
    add(layers.growing, True)
    add(layers.all, True)
    return found


def choices(layers: Layers, wanted: dict[str, dict[str, Any]]) -> dict[str, Choice]:
    """The policies of ``subsets``."""
    k, v, protected_v = as_format(K), as_format(V), as_format(PROTECTED_V)
    found = {}
    for name, about in wanted.items():
        packed = layers.all if about["packs_windows"] else layers.growing
        pairs = tuple((k, protected_v if i in about["protected"] else v) for i in packed)
        found[name] = Choice(LayerList(pairs, name), about["packs_windows"])
    return found


@click.command()
@options.combined(options.model, options.dtype, options.backend)
@click.option("--text", "-f", metavar="FILE|sample|wikitext-2")
@click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(8), default=2048, show_default=True)
@click.option("--chunks", type=click.IntRange(2), default=16, show_default=True, help="Windows.")
@click.option("--time-limit", type=float, metavar="SECONDS",
              help="Start no configuration that would end later.")  # fmt: skip
@click.option("--json", "json_path", required=True, metavar="FILE")
def command(text, n_ctx, chunks, backend, time_limit, json_path, **args) -> None:
    """Measure which layers are worth protecting."""
    deadline = time.perf_counter() + (time_limit or 1e9)
    import mlx.core as mx

    from mlx_turbokv.evaluate.text import load_text
    from mlx_turbokv.files import write_text

    source, loaded, path = load_text(text), load_model(args), Path(json_path)
    backend = select_backend(backend).name
    if mx.default_device().type == mx.DeviceType.gpu:
        mx.set_cache_limit(CACHE_LIMIT)
    layers = Layers(loaded.model)
    wanted = subsets(layers)
    about = {"all": layers.all, "growing": layers.growing, "window": layers.window}
    record = start_record(path, loaded, source, backend, WHAT, layers=about, choices=wanted,
                          formats={"k": K, "v": V, "protected_v": PROTECTED_V})  # fmt: skip
    measurement = Unprotected(loaded, source, backend, choices(layers, wanted))
    measure_length(
        measurement, record, n_ctx, chunks, [(name, None) for name in wanted],
        lambda found: write_text(path, json.dumps(found) + "\n"), deadline,
    )  # fmt: skip


if __name__ == "__main__":
    run(command)
