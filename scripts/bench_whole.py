#!/usr/bin/env python3
"""Speed and memory of a hybrid and of a mixture of experts, with random weights.

    python scripts/bench_whole.py Qwen3.5-27B
    python scripts/bench_whole.py Qwen3-30B-A3B
    python scripts/bench_whole.py Qwen3.5-27B --tiny --backend reference --json x.json

What ``mlx_turbokv bench`` measures, point by point within a time limit: decode after contexts that
are filled without the model, then prompts from the shortest on. A prompt that would not end in time
is not begun. The record is written after each point, and the same command goes on. Weights are in
bfloat16 (27B: 54 GB) unless --weight-bits 4. --tiny takes a few narrow layers of the same kinds,
for a check without a GPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import click  # noqa: E402

from mlx_turbokv.cli import bench, options  # noqa: E402
from mlx_turbokv.cli.entry import run  # noqa: E402
from mlx_turbokv.cli.output import print_status, write_json  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.loading.known_shapes import known_config  # noqa: E402

RECORDS = {"Qwen3.5-27B": "bench_qwen3_5_27b", "Qwen3-30B-A3B": "bench_qwen3_30b_a3b"}
CONFIGS = ("f16/f16", "balanced", "la-v7")
CONTEXTS, PROMPTS = (8192, 32768, 131072), (512, 2048, 8192, 32768)
TINY_CONTEXTS, TINY_PROMPTS = (256, 512), (16, 64)
DTYPE, TINY_DTYPE = "bfloat16", "float32"  # a CPU multiplies experts in float32 alone
TRIALS, TOKENS = 3, 64
TINY_TRIALS, TINY_TOKENS = 2, 4
MARGIN = 1.3  # attention grows faster than the prompt
LIMIT = 165.0  # seconds, loading included
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip


def shape(name: str, tiny: bool) -> dict[str, Any]:
    """The configuration of a shape; a tiny one has the same kinds of layers."""
    found = known_config(name)
    assert found is not None
    if not tiny:
        return found

    def smaller(values: dict[str, Any]) -> dict[str, Any]:
        return values | {key: size for key, size in TINY.items() if key in values}

    inner = {"text_config": smaller(found["text_config"])} if "text_config" in found else {}
    return smaller(found) | inner


def drawn_model(name: str, tiny: bool, bits: int) -> tuple[Any, dict[str, Any], int]:
    """The model, what its record says of it, and the size of its vocabulary."""
    from mlx_turbokv.loading import random_model

    config, dtype = shape(name, tiny), TINY_DTYPE if tiny else DTYPE
    model = random_model.random_model(config, bits, dtype=dtype)
    about = {
        "model": {"name": f"{name}, tiny" if tiny else name, "source": name, "dtype": dtype},
        "weights": f"random weights of {bits} bits, activations in {dtype}",
        "weight_bytes": random_model.weight_bytes(model),
    }
    return model, about, random_model.vocabulary_size(config)


def seconds_of_prompt(rows: list[dict], tokens: int, n_trials: int) -> float:
    """What a prompt's trials will take in all configurations, from the longest one before it."""
    prompts = [row for row in rows if row["kind"] == "prompt" and "error" not in row]
    longest = max((row["tokens"] for row in prompts), default=0)
    times = [longest / row["prompt_tps"]["median"] for row in prompts if row["tokens"] == longest]
    return MARGIN * n_trials * sum(times) * tokens / longest if times else 0.0


def say(row: dict) -> None:
    """Print a row as soon as it is measured."""
    head = f"{row['kind']} {row['tokens']:,} {row['config']}"
    if "error" in row:
        print_status(f"{head}: failed: {row['error']}")
        return
    found = [f"prefill {row['prompt_tps']['median']:,.1f} tok/s"] if "prompt_tps" in row else []
    found.append(f"decode {row['generation_tps']['median']:,.1f} tok/s")
    for what, key in (("KV", "kv_bytes"), ("peak above weights", "peak_bytes_above_weights")):
        found.append(f"{what} {row[key] / 2**20:,.1f} MiB")
    print_status(f"{head}: {', '.join(found)}")


def measure(
    name: str, tiny: bool, bits: int, backend: str, path: Path, deadline: float
) -> dict[str, Any]:
    """Measure what the record lacks, point by point; write and return it."""
    from mlx_turbokv.evaluate.benchmark import Point, Settings

    started = time.perf_counter()
    model, about, vocabulary = drawn_model(name, tiny, bits)
    print_status(f"{about['model']['name']}: {about['weight_bytes'] / 2**30:.1f} GiB of random "
                 f"weights in {time.perf_counter() - started:.1f} s")  # fmt: skip
    contexts, prompts = (TINY_CONTEXTS, TINY_PROMPTS) if tiny else (CONTEXTS, PROMPTS)
    n_trials, n_tokens = (TINY_TRIALS, TINY_TOKENS) if tiny else (TRIALS, TOKENS)
    settings = Settings(n_tokens, n_trials, vocab_size=vocabulary)
    points = [Point("context", n) for n in contexts] + [Point("prompt", n) for n in prompts]
    record: dict[str, Any] = {"rows": []}
    not_measured: list[str] = []
    for point in points:
        # one trial that is not timed, and one that is
        needed = seconds_of_prompt(record["rows"], point.tokens, 2) * (point.kind == "prompt")
        if time.perf_counter() + needed > deadline:
            not_measured.append(f"{point.kind} {point.tokens:,}")
            print_status(f"{not_measured[-1]}: no time left")
            continue
        record = bench.measure(
            model, about, list(CONFIGS), [point], settings, backend, str(path), deadline=deadline
        )  # fmt: skip
        for row in record["rows"]:
            if (row["kind"], row["tokens"]) == (point.kind, point.tokens):
                say(row)
    if record["rows"]:
        record["not_measured"] = not_measured
        write_json(str(path), record)
    return record


@click.command()
@click.argument("name", type=click.Choice(list(RECORDS)))
@options.backend
@click.option("--tiny", is_flag=True, help="A few narrow layers of the same kinds.")
@click.option("--weight-bits", type=click.Choice(["4", "8", "16"]), default="16", show_default=True)
@click.option("--time-limit", default=LIMIT, show_default=True, metavar="SECONDS")
@click.option("--json", "path", type=click.Path(path_type=Path),
              help="The record.  [default: of benchmarks/]")  # fmt: skip
def command(name, backend, tiny, weight_bits, time_limit, path) -> None:
    """Measure a shape."""
    deadline = time.perf_counter() + time_limit
    if tiny and path is None:
        raise InputError("Give --json FILE with --tiny: benchmarks/ has the whole shapes.")
    path = path or ROOT / f"benchmarks/{RECORDS[name]}.json"
    measure(name, tiny, int(weight_bits), options.check_backend(backend), path, deadline)


if __name__ == "__main__":
    run(command)
