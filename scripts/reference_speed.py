"""What the reference back-end costs on a CPU: decoding at 1,024 tokens, and a 512-token window.

    python scripts/reference_speed.py --json benchmarks/reference_speed.json

Configurations take turns within one run, and the ratio to f16 is of medians.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import click
import mlx.core as mx
from mlx_lm.generate import generate_step
from record import record
from tqdm import tqdm

import mlx_turbokv  # noqa: I001: before mlx.core, so that OpenBLAS is used
from mlx_turbokv.cli.entry import run
from mlx_turbokv.evaluate.text import load_text

STEPS = 12
CONFIGS = {
    "f16": ("f16", "f16", None),
    "la-v7": ("q8_0", "turbo2", "la-v7"),
    "q8_0/q8_0": ("q8_0", "q8_0", None),
    "turbo4/turbo3": ("turbo4", "turbo3", None),
}


def decode(model, cache: list, steps: int) -> float:
    """Seconds of ``steps`` tokens, generated as mlx-lm does: one step ahead."""
    tokens = generate_step(mx.array([1]), model, max_tokens=steps, prompt_cache=cache)
    next(tokens)
    start = time.perf_counter()
    n = sum(1 for _ in tokens)
    return (time.perf_counter() - start) * steps / n


def seconds(work) -> float:
    start = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - start


@click.command()
@click.option("--tokens", default=1024, show_default=True)
@click.option("--rounds", default=6, show_default=True, help="Of 12 tokens each.")
@click.option("--windows", default=5, show_default=True)
@click.option("--json", "json_file", default=None, help="Write the record to this file.")
def command(tokens, rounds, windows, json_file) -> None:
    """Decode steps and 512-token windows of the default model, packed against f16."""
    from mlx_turbokv.loading.models import load

    loaded = load(None)
    model, ids = loaded.model, loaded.tokenizer.encode(load_text("sample").text)

    def caches(name: str) -> list:
        k, v, policy = CONFIGS[name]
        return mlx_turbokv.make_prompt_cache(model, k, v, policy, backend="reference")

    prompt, window = mx.array([ids[:tokens]]), mx.array([ids[:512]])
    held = {name: caches(name) for name in CONFIGS}
    for cache in held.values():
        mx.eval(model(prompt, cache=cache))
    step_times = {name: [] for name in CONFIGS}
    window_times = {name: [] for name in CONFIGS}
    for i in tqdm(range(rounds + 1), desc="decode", leave=False):
        for name, cache in held.items():
            taken = decode(model, cache, STEPS) / STEPS
            if i:
                step_times[name].append(taken)
    for i in tqdm(range(windows + 1), desc="windows", leave=False):
        for name in CONFIGS:
            taken = seconds(lambda: model(window, cache=caches(name)))  # noqa: B023
            if i:
                window_times[name].append(taken)
    rows = []
    click.echo(f"{'':16}{'decode tok/s':>14}{'of f16':>8}{'window s':>12}{'of f16':>8}")
    for name in CONFIGS:
        step, prefill = median(step_times[name]), median(window_times[name])
        rows.append({"config": name, "decode_s": step, "window_s": prefill})
        rows[-1]["decode_tps_ratio"] = rows[0]["decode_s"] / step
        rows[-1]["window_time_ratio"] = prefill / rows[0]["window_s"]
        click.echo(
            f"{name:16}{1 / step:14.2f}{rows[-1]['decode_tps_ratio']:8.2f}"
            f"{prefill:12.2f}{rows[-1]['window_time_ratio']:8.2f}"
        )
    if json_file:
        results = record(tokens=tokens, rounds=rounds, windows=windows, rows=rows)
        Path(json_file).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run(command)
