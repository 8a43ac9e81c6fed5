"""Does decoding copy the packed body? Peak memory of 200 steps of the default model.

    python scripts/decode_memory.py --tokens 16384 -ctk q8_0 -ctv turbo2

The caches are filled with random rows: only their size matters here.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import mlx.core as mx
from record import record
from tqdm import tqdm

import mlx_turbokv  # noqa: I001: before mlx.core, so that OpenBLAS is used
from mlx_turbokv.cache import FLUSH_TOKENS
from mlx_turbokv.cli.entry import run

ALLOWED = 2 * 2**20  # bytes a layer above the packed rows


@click.command()
@click.option("--tokens", default=16_384, show_default=True)
@click.option("--steps", default=200, show_default=True)
@click.option("-ctk", "--cache-type-k", default="q8_0", show_default=True)
@click.option("-ctv", "--cache-type-v", default="turbo2", show_default=True)
@click.option("--json", "json_file", default=None, help="Write the record to this file.")
def command(tokens, steps, cache_type_k, cache_type_v, json_file) -> None:
    """Measure peak memory above the model and its packed caches while decoding."""
    from mlx_turbokv.loading.models import load

    loaded = load(None)
    caches = mlx_turbokv.make_prompt_cache(loaded.model, cache_type_k, cache_type_v)
    args = loaded.model.args
    head_dim = args.head_dim or args.hidden_size // args.num_attention_heads
    shape = (1, args.num_key_value_heads, 1024, head_dim)
    for cache in tqdm(caches, desc="filling", leave=False):
        for _ in range(tokens // 1024):
            cache.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
            mx.eval(cache.state)
        half = (*shape[:2], FLUSH_TOKENS // 2, head_dim)  # so that the steps meet a flush
        cache.update_and_fetch(mx.random.normal(half), mx.random.normal(half))
        mx.eval(cache.state)
    token = mx.array([[1]])
    mx.eval(loaded.model(token, cache=caches))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in tqdm(range(steps), desc="decoding", leave=False):
        token = mx.argmax(loaded.model(token, cache=caches)[:, -1], axis=-1, keepdims=True)
        mx.async_eval(token)
    mx.eval(token)
    above = mx.get_peak_memory() - before
    packed = sum(cache.nbytes for cache in caches)
    allowed = ALLOWED * len(caches)
    click.echo(
        f"{tokens} tokens, {cache_type_k}/{cache_type_v}: packed {packed:,} bytes; peak of "
        f"{steps} steps {above:,} bytes above, {allowed:,} allowed"
    )
    if json_file:
        results = {"tokens": tokens, "steps": steps, "peak_above": above, "allowed": allowed}
        results |= {"formats": f"{cache_type_k}/{cache_type_v}", "packed_bytes": packed}
        Path(json_file).write_text(json.dumps(record(**results), indent=1) + "\n")
    raise SystemExit(above > allowed)


if __name__ == "__main__":
    run(command)
