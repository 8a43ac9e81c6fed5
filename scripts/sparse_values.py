"""Sparse V: what share of V's rows decode could skip because no query head of the group needs them.

A row is needed where a head's weight is at least --threshold times that of a largest score: of all
tokens, of the tokens of one split, or of those that a SIMD group of decode.metal has met so far.
Measured on a model's own queries and keys: the last queries of windows of a text, every layer.
Writes benchmarks/sparse_values.json.

    python scripts/sparse_values.py --text FILE
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from record import record  # noqa: E402

from mlx_turbokv.evaluate.configuration import Prepared, prepare  # noqa: E402
from mlx_turbokv.evaluate.record import model_record  # noqa: E402
from mlx_turbokv.evaluate.text import load_text  # noqa: E402
from mlx_turbokv.evaluate.windows import PREFILL_STEP, cut_windows  # noqa: E402
from mlx_turbokv.kernels.decode import THREADS, n_splits  # noqa: E402
from mlx_turbokv.loading.models import load  # noqa: E402  (finds OpenBLAS before MLX is imported)
from mlx_turbokv.quant.layout import TILE  # noqa: E402

CONTEXTS = {512: 4, 2048: 1, 8192: 1}  # windows of each
CONFIGS = ("f16/f16", "turbo4/turbo3", "q8_0/turbo2")
UNITS = (32, 16, 8, 1)  # tokens that are skipped together
SIMD_GROUPS = THREADS // 32
LAST = 8  # queries come from the last eighth of a window


def tile_step(gqa_factor: int) -> int:
    """Tiles that a SIMD group of decode.metal takes at a time: one query, V of at most 256 dims."""
    return 2 if gqa_factor <= 4 else 1


def running_maximum(maxima: np.ndarray, splits: int, step: int) -> np.ndarray:
    """The largest score that a SIMD group has met when it weighs each tile, that tile's included.

    Splits cut the tiles evenly; the SIMD groups of one stride over its tiles, ``step`` at a time.

    Shapes: maxima [..., tiles]; returns the same.
    """
    *lead, n = maxima.shape
    found = np.empty_like(maxima)
    for y in range(splits):
        begin, end = n * y // splits, n * (y + 1) // splits
        rounds = -(-(end - begin) // (SIMD_GROUPS * step))
        own = np.full((*lead, rounds * SIMD_GROUPS * step), -np.inf, maxima.dtype)
        own[..., : end - begin] = maxima[..., begin:end]
        own = own.reshape(*lead, rounds, SIMD_GROUPS, step)
        own[:] = np.maximum.accumulate(own.max(axis=-1, keepdims=True), axis=-3)
        found[..., begin:end] = own.reshape(*lead, -1)[..., : end - begin]
    return found


def split_maximum(maxima: np.ndarray, splits: int) -> np.ndarray:
    """The largest score of each tile's split. Shapes: maxima [..., tiles]; returns the same."""
    n = maxima.shape[-1]
    found = np.empty_like(maxima)
    for y in range(splits):
        at = slice(n * y // splits, n * (y + 1) // splits)
        found[..., at] = maxima[..., at].max(axis=-1, keepdims=True, initial=-np.inf)
    return found


def skippable(
    scores: np.ndarray, splits: int, step: int, threshold: float
) -> dict[str, np.ndarray]:
    """The share of units in which no head needs a row, by what weights are compared with.

    ``final``: the largest score of all tokens; ``split``: of the split's; ``running``: of those that
    a SIMD group has met so far; ``one_split``: the same where one threadgroup takes all tokens.

    Shapes:
        scores: [KV heads, heads a KV head, tokens], natural logarithms of weights.
        returns: [KV heads, len(UNITS)] each.
    """
    n = scores.shape[-1]
    tiles = -(-n // TILE)
    padded = np.full((*scores.shape[:-1], tiles * TILE), -np.inf, scores.dtype)
    padded[..., :n] = scores
    padded = padded.reshape(*scores.shape[:-1], tiles, TILE)
    maxima = padded.max(axis=-1)
    references = {
        "final": split_maximum(maxima, 1),
        "split": split_maximum(maxima, splits),
        "running": running_maximum(maxima, splits, step),
        "one_split": running_maximum(maxima, 1, step),
    }
    found = {}
    for name, reference in references.items():
        needed = (padded - reference[..., None] >= np.log(threshold)).any(axis=1)
        needed = needed.reshape(len(scores), -1)
        found[name] = np.stack(
            [1 - needed.reshape(len(scores), -1, u).any(axis=-1).sum(axis=-1) / -(-n // u) for u in UNITS],
            axis=-1,
        )  # fmt: skip
    return found


def scores_of(
    model, window: np.ndarray, caches: list, positions: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Layer and scores of the queries at some positions of a window, over the keys up to each.

    Shapes: window [n]; yields [KV heads, heads a KV head, position + 1] for each layer and position.
    """
    plain = mx.fast.scaled_dot_product_attention
    seen: list[tuple[int, np.ndarray]] = []
    layer = 0

    def note(q, k, v, *, scale, **options):
        nonlocal layer
        first = k.shape[2] - q.shape[2]
        own = [p for p in positions if first <= p < k.shape[2]]
        if own:
            rows = q[0, :, mx.array(own) - first].astype(mx.float32)  # [queries, heads, dim]
            keys = (k[0] * 1).astype(mx.float32)
            rows = rows.reshape(len(own), len(keys), -1, rows.shape[-1]).swapaxes(0, 1)
            products = rows.reshape(len(keys), -1, rows.shape[-1]) @ keys.swapaxes(1, 2)
            found = np.array(products).reshape(len(keys), len(own), -1, k.shape[2]) * scale
            seen.extend((layer, found[:, i, :, : p + 1]) for i, p in enumerate(own))
        layer += 1
        return plain(q, k, v, scale=scale, **options)

    for start in range(0, len(window), PREFILL_STEP):
        layer = 0
        mx.fast.scaled_dot_product_attention = note
        try:
            model(mx.array(window[start : start + PREFILL_STEP])[None], cache=caches)
        finally:
            mx.fast.scaled_dot_product_attention = plain
        mx.eval([c.state for c in caches])
        yield from seen
        seen.clear()


def measure(model, windows: np.ndarray, config: Prepared, queries: int, threshold: float) -> dict:
    """Shares by what weights are compared with: of layers, each a list over UNITS.

    ``splits`` are those of the earliest query.
    """
    n = windows.shape[1]
    positions = [n - 1 - i * (n // LAST) // queries for i in range(queries)]
    total: dict[str, dict[int, list]] = {}
    for window in windows:
        for layer, scores in scores_of(model, window, config.make_caches(), positions):
            kv_heads, gqa_factor, tokens = scores.shape
            splits = n_splits(-(-tokens // TILE), kv_heads)
            for name, found in skippable(scores, splits, tile_step(gqa_factor), threshold).items():
                total.setdefault(name, {}).setdefault(layer, []).append(found.mean(axis=0))
    by_layer = {
        name: np.array([np.mean(of[i], axis=0) for i in range(len(of))]).round(5).tolist()
        for name, of in total.items()
    }
    return {"config": config.name, "n_ctx": n, "windows": len(windows), "queries": queries,
            "splits": splits, "heads": [kv_heads * gqa_factor, kv_heads], "by_layer": by_layer}  # fmt: skip


@click.command()
@click.option("--model", default=None, help="Hub id, folder or .gguf; default: the small model.")
@click.option("--text", default=lambda: os.environ.get("TURBOKV_WIKITEXT", "sample"))
@click.option("--threshold", default=1e-6, show_default=True)
@click.option("--queries", default=16, show_default=True, help="Of each window.")
@click.option("--contexts", default="512,2048,8192", show_default=True)
@click.option("--configs", default=",".join(CONFIGS), show_default=True)
@click.option("--json", "json_path", default=str(ROOT / "benchmarks/sparse_values.json"))
def main(model, text, threshold, queries, contexts, configs, json_path):
    """Rows that the JSON file has are kept and not measured again; each carries its own record."""
    path = Path(json_path)
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    loaded, source = load(model), load_text(text)
    tokens = list(loaded.tokenizer.encode(source.text, add_special_tokens=False))
    for n_ctx in (int(n) for n in contexts.split(",")):
        windows = cut_windows(loaded.tokenizer, tokens, n_ctx, CONTEXTS.get(n_ctx, 1))
        for name in configs.split(","):
            if any((row["n_ctx"], row["config"]) == (n_ctx, name) for row in rows):
                continue
            started = time.perf_counter()
            found = measure(loaded.model, windows, prepare(loaded.model, name), queries, threshold)
            means = {k: np.mean(v, axis=0).round(4).tolist() for k, v in found["by_layer"].items()}
            seconds = round(time.perf_counter() - started, 1)
            print(n_ctx, name, means, f"{seconds} s", flush=True)
            rows.append(record(
                model=model_record(loaded), text_sha256=source.sha256, threshold=threshold,
                units=list(UNITS), last=LAST, seconds=seconds, **found,
            ))  # fmt: skip
            path.write_text(json.dumps({"rows": rows}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
