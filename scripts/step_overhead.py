#!/usr/bin/env python3
"""Times what the CPU spends on a layer's cache and attention in a decode step, nothing evaluated.

    python scripts/step_overhead.py --json benchmarks/step_overhead.json

For each cache the layers of a model in turn take a token and attend to what they hold, as in
mlx-lm's models; the times are those of building the graph. Where there is no GPU, the calls of the
Metal kernels are built inside an export of the graph, which needs no device to run on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import click
import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache
from record import record

import mlx_turbokv  # noqa: I001: before mlx.core, so that OpenBLAS is used
from mlx_turbokv.cli.entry import run
from mlx_turbokv.kernels.backend import available_backends

RUNS = available_backends()[0] != "reference"
CACHES = ("f16", "q8_0/turbo2", "turbo4/turbo3")
ROUNDS = 40
STEPS = 8


class MetalCache(mlx_turbokv.TurboKVCache):
    """A packed cache whose kernels are Metal's, whether or not this machine has any."""

    @property
    def backend(self):
        from mlx_turbokv.kernels import backend

        return backend._backend("metal", True)


def layer_caches(name: str, layers: int, tokens: int, heads: tuple[int, int], dim: int) -> list:
    """Caches of a model's layers with ``tokens`` rows, and what a layer gives at a step."""
    kind = mlx_turbokv.TurboKVCache if RUNS else MetalCache
    rows = mx.zeros((1, heads[1], tokens, dim), mx.float16)
    caches = []
    for _ in range(layers):
        cache = KVCache() if name == "f16" else kind(*name.split("/"))
        if name != "f16":
            cache.handles = True  # as the API sets it for models that only pass K and V on
        cache.update_and_fetch(rows, rows)
        settle(cache)
        caches.append(cache)
    return caches


def step_times(caches: list, heads: tuple[int, int], dim: int) -> list[float]:
    """Seconds a layer of STEPS steps through all layers, ROUNDS times."""
    queries = mx.zeros((1, heads[0], 1, dim), mx.float16)
    token = mx.zeros((1, heads[1], 1, dim), mx.float16)
    mx.eval(queries, token)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(STEPS):
            for cache in caches:
                keys, values = cache.update_and_fetch(token, token)
                output = scaled_dot_product_attention(
                    queries, keys, values, cache=cache, scale=dim**-0.5, mask=None
                )
        times.append((time.perf_counter() - start) / STEPS / len(caches))
        del keys, values, output
        for cache in caches:
            settle(cache)
    return times


def settle(cache) -> None:
    """End the graph here: evaluate what the cache holds, or put zeros where nothing can be."""
    for name in ("keys", "values", "body", "tail"):
        held = vars(cache).get(name)
        if held is not None:
            if not RUNS and held.size:
                held = mx.zeros(held.shape, held.dtype)
                setattr(cache, name, held)
            mx.eval(held)


def measure(layers: int, tokens: int, heads: tuple[int, int], dim: int) -> list[dict]:
    """One row a cache."""
    rows = []
    for name in CACHES:
        times = step_times(layer_caches(name, layers, tokens, heads, dim), heads, dim)
        rows.append(
            {
                "cache": name,
                "us": round(1e6 * median(times), 2),
                "low_us": round(1e6 * min(times), 2),
            }
        )
        rows[-1]["added_us"] = round(rows[-1]["us"] - rows[0]["us"], 2)
        click.echo(
            f"{name:14} {rows[-1]['us']:6.2f} us a layer and step, {rows[-1]['added_us']:+.2f}"
        )
    return rows


@click.command()
@click.option("--layers", default=32, show_default=True)
@click.option("--tokens", default=4096, show_default=True)
@click.option("--heads", default="32,8", show_default=True, help="Query heads, KV heads.")
@click.option("--head-dim", default=128, show_default=True)
@click.option("--json", "json_file", default=None, help="Write the record to this file.")
def command(layers, tokens, heads, head_dim, json_file) -> None:
    """Time the building of decode steps, cache by cache."""
    heads = tuple(int(n) for n in heads.split(","))
    backend, rows = available_backends()[0], []

    def all_caches(x: mx.array) -> mx.array:
        rows.extend(measure(layers, tokens, heads, head_dim))
        return x + 1

    if not RUNS:
        mx.export_function(lambda _: None, all_caches, mx.zeros((1,)))
    else:
        all_caches(mx.zeros((1,)))
    if json_file:
        backend = backend if RUNS else "metal, built and not run"
        results = {
            "backend": backend,
            "layers": layers,
            "tokens": tokens,
            "steps": STEPS,
            "rounds": ROUNDS,
        }
        results |= {"heads": heads, "head_dim": head_dim, "rows": rows}
        Path(json_file).write_text(json.dumps(record(**results), indent=1) + "\n")


if __name__ == "__main__":
    run(command)
